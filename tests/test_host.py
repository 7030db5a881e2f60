"""How much memory there is, inside a container too."""

from pathlib import Path

import pytest

from luffy.host import host_memory

GIB = 2**30


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


MEMINFO = {"proc/meminfo": f"MemTotal: {64 * 2**20} kB\nMemAvailable:   {3 * 2**18} kB\n"}
STAT = f"anon 1\ninactive_file {GIB // 4}\ntotal_inactive_file {GIB // 4}\n"


def test_here():
    found = host_memory()
    assert 0 < found.available <= found.total < 2**50


def test_a_host_without_limits(tmp_path):
    assert host_memory(tree(tmp_path, MEMINFO)).available == 0.75 * GIB
    files = {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "max\n"}
    assert host_memory(tree(tmp_path, files)).available == 0.75 * GIB
    files = {"proc/self/cgroup": "3:cpu,cpuacct:/a\n9:memory:/a\n"}
    unlimited = {"sys/fs/cgroup/memory/a/memory.limit_in_bytes": "9223372036854771712"}
    assert host_memory(tree(tmp_path, files | unlimited)).available == 0.75 * GIB


@pytest.mark.parametrize(
    ("groups", "folder", "names"),
    [
        ("0::/\n", "", ("memory.max", "memory.current")),
        ("0::/user/run\n", "user", ("memory.max", "memory.current")),
        ("0::/not/seen/from/inside\n", "", ("memory.max", "memory.current")),
        ("9:memory:/docker/1\n1:pids:/\n", "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")),
    ],
)
def test_a_container_has_what_its_group_leaves(tmp_path, groups, folder, names):
    limit, used = (f"sys/fs/cgroup/{folder}/{name}" for name in names)
    stat = f"sys/fs/cgroup/{folder}/memory.stat"
    files = {"proc/self/cgroup": groups, limit: f"{GIB // 2}", used: f"{GIB // 2}", stat: STAT}
    assert host_memory(tree(tmp_path, MEMINFO | files)) == (0.5 * GIB, 0.25 * GIB)


def test_the_tightest_of_several_limits_counts(tmp_path):
    group = {"memory.max": f"{GIB}", "memory.current": f"{GIB // 2}"}
    inner = {"memory.max": f"{GIB // 2}", "memory.current": "100", "memory.stat": STAT}  # less in use than its cache
    files = {f"sys/fs/cgroup/a/{name}": text for name, text in group.items()}
    files |= {f"sys/fs/cgroup/a/b/{name}": text for name, text in inner.items()}
    files |= MEMINFO | {"proc/self/cgroup": "0::/a/b\n"}
    assert host_memory(tree(tmp_path, files)) == (0.5 * GIB, 0.5 * GIB)
    (tmp_path / "sys/fs/cgroup/a/memory.max").write_text(f"{3 * GIB // 4}")
    assert host_memory(tmp_path) == (0.5 * GIB, 0.25 * GIB)


def test_no_system_says_nothing(tmp_path):
    found = host_memory(tmp_path)
    assert found.total == found.available > 0
