"""`luffy recipes`."""

import json
import re

import pytest
from tiny import luffy

from luffy.config import flat_keys
from luffy.config_file import load_stages
from luffy.recipe_book import differing, spelled_out


def test_the_list_names_every_recipe(tmp_path):
    done = luffy("recipes", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == luffy("recipes", "list", cwd=tmp_path).stdout
    for name, objective in [("quickstart", "luffy"), ("sft-then-rl-qwen2.5-math-7b", "dr_grpo")]:
        [line] = [line for line in done.stdout.splitlines() if line.startswith(f"{name} ")]
        assert objective in line.split()


@pytest.mark.parametrize("name", ["quickstart", "luffy-qwen2.5-math-7b", "sft-then-rl-qwen2.5-math-7b"])
def test_what_is_shown_trains_the_same(name, tmp_path):
    done = luffy("recipes", "show", name, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (tmp_path / "copy.toml").write_text(done.stdout)
    assert load_stages(str(tmp_path / "copy.toml")) == load_stages(name)
    same = luffy("recipes", "diff", name, "copy.toml", cwd=tmp_path)
    assert same.stdout == f"{name} and copy.toml are the same in every key\n"
    assert luffy("recipes", "diff", name, "copy.toml", "--json", cwd=tmp_path).stdout.strip() == "[]"
    assert ("first" in spelled_out(name)) == (len(load_stages(name)) == 2)


def test_a_first_stage_that_is_without_the_others_default_is_shown_so(tmp_path):
    """TOML has no null, and a first stage takes over what the second says."""
    (tmp_path / "two.toml").write_text('[objective]\nname = "grpo"\n[first.objective]\nname = "luffy"\n')
    done = luffy("recipes", "show", "two.toml", cwd=tmp_path)
    (tmp_path / "copy.toml").write_text(done.stdout)
    first, last = load_stages(str(tmp_path / "copy.toml"))
    assert [first, last] == load_stages(str(tmp_path / "two.toml"))
    assert (first.objective.clip_low, last.objective.clip_low) == (None, 0.2)
    assert "# clip_low = 0.2" in done.stdout.splitlines()


def test_every_key_is_shown(tmp_path):
    shown = luffy("recipes", "show", "quickstart", cwd=tmp_path).stdout.splitlines()
    table, found = "", set()
    for line in shown:
        if line.startswith("["):
            table = f"{line[1:-1]}."
            found.add(line[1:-1])
        elif name := re.match(r"(?:# )?(\w+) (?:= |is not set$)", line):
            found.add(table + name[1])
    assert set(flat_keys(type(load_stages("quickstart")[-1]))) <= found
    assert "# rank is not set" in shown
    told = json.loads(luffy("recipes", "show", "quickstart", "--json", cwd=tmp_path).stdout)
    assert told["model"]["lora"]["rank"] is None


def test_what_differs(tmp_path):
    found = {key: (one, other) for key, one, other in differing("luffy-qwen2.5-math-7b", "on-policy-qwen2.5-math-7b")}
    assert found["objective.name"] == ("luffy", "dr_grpo")
    assert found["objective.gamma"] == ("0.1", "-")
    assert "model.name" not in found
    done = luffy("recipes", "diff", "quickstart", "nope", cwd=tmp_path)
    assert done.returncode == 2
    assert "no recipe named 'nope'" in done.stderr
