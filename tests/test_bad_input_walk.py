"""Every error that the features list as bad input, one after the other, provoked for real: one sentence says what it is
about, what would be right, what is there and what to do; the exit code is 2; and nothing is lost."""

from collections.abc import Iterator
from subprocess import CompletedProcess

import pytest
import torch.distributed as dist
from bad_answers import DATA, EVALUATION, ROLLOUTS
from bad_calls import CALLS, HEADS
from bad_inputs import Bad, Home, check_sentence, processes, snapshot
from bad_listed import LISTED
from bad_runs import RANKS, TRAINING

from luffy.errors import UserError

pytestmark = pytest.mark.timeout(600)  # whoever is first to need the server and the run waits for both

RUN = [*TRAINING, *RANKS, *ROLLOUTS, *DATA, *EVALUATION]
CALLED = [*CALLS, *HEADS]
ENTRIES = {
    "training": TRAINING,
    "kernels": CALLS,
    "many ranks": RANKS,
    "rollouts": ROLLOUTS,
    "objectives and data": DATA,
    "evaluation": EVALUATION,
    "patched models": HEADS,
}


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Iterator[Home]:
    with pytest.MonkeyPatch.context() as patched:
        path = tmp_path_factory.mktemp("home")
        patched.setenv("LUFFY_CACHE", str(path / "cache"))
        patched.chdir(path)
        made = Home(path, patched)
        yield made
        made.close()


@pytest.mark.parametrize(
    "bad",
    [pytest.param(bad, id=bad.error, marks=[pytest.mark.slow] if bad.slow else []) for bad in RUN],
)
def test_every_listed_error(bad: Bad, home: Home, capfd):
    for name in bad.needs:
        getattr(home, name)
    act = bad.provoke(home)
    before, running, grouped = snapshot(home.path), processes(home.path), dist.is_initialized()
    capfd.readouterr()
    try:
        done = act()
    except UserError as error:  # of what no command reaches alone
        done = CompletedProcess((), 2, "", f"luffy: {error}\n")
    said = capfd.readouterr()
    if isinstance(done, CompletedProcess):
        code, out, err = done.returncode, done.stdout, done.stderr
    else:
        code, out, err = done, said.out, said.err
    assert code == bad.code, (out + err)[-3000:]
    assert "Traceback" not in out + err
    if bad.says:
        *progress, sentence = err.splitlines()
        assert sentence.startswith("luffy: "), err
        assert not any(line.startswith("luffy: ") for line in progress), err
        check_sentence(sentence, bad.says)
    for words in bad.shows:
        assert words in out + err, (out + err)[-3000:]
    bad.after(home)
    assert bad.loses(before, snapshot(home.path)) == []
    assert processes(home.path) <= running
    assert grouped or not dist.is_initialized()  # other tests of this process may have left a group


@pytest.mark.parametrize("feature", LISTED)
def test_there_is_an_entry_for_each_listed_error_and_for_no_other(feature):
    errors = [bad.error for bad in ENTRIES[feature]]
    assert not [listed for listed in LISTED[feature] if not any(error.startswith(listed) for error in errors)]
    assert not [error for error in errors if not error.startswith(LISTED[feature])]


@pytest.mark.parametrize("bad", [pytest.param(bad, id=bad.error) for bad in CALLED])
def test_every_listed_error_of_a_call(bad):
    bad.provoke()
