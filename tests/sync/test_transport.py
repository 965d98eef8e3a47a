"""Parts as files: what a resume finds, what is looked for, what housekeeping may cost, and what is left in shared memory."""

import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from slime.cluster import shared_folder
from slime.config import SyncConfig
from slime.sync import transport
from slime.sync.chain import Lease
from slime.sync.manifest import ANCHOR, NO_ROOT, Manifest, sign
from slime.sync.places import Busy, Patient
from slime.sync.records import ModelSpec, TensorSpec
from slime.sync.store import Artefact, SplitBrain, WeightStore
from slime.sync.store_local import LocalStore
from slime.sync.transport import StoreTransport
from tests.sync.stores import KEY, Flaky, version

LARGE = ModelSpec((TensorSpec("a", (1 << 20,), "float32"),))  # beside which the versions' parts are small


@pytest.fixture(autouse=True)
def parts_are_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where Ray would have references."""
    monkeypatch.setattr(transport.deadline, "get", lambda refs, *_: refs)


def store_at(where: Path, key: bytes | None = None) -> WeightStore:
    return WeightStore(LocalStore(where), "run", key)


def opened(where: Path, key: bytes | None = None, **knobs: Any) -> StoreTransport:
    cfg = SyncConfig(transport="store", url=str(where), timeout_s=10, **{"keep": 1, "anchor_every": 2, **knobs})
    made = transport.make(cfg, where, "run", key)
    assert isinstance(made, StoreTransport)
    return made


def anchor_of(manifest: Manifest) -> Manifest:
    return replace(manifest, kind=ANCHOR, parent_epoch=-1, parent_number=-1, parent_root=NO_ROOT)


def publish(made: StoreTransport, where: Path, number: int, epoch: int = 0, writes: bool = True) -> list[int]:
    """A version, sent and settled; numbers of the anchors that were asked for, and written."""
    manifest, parts = version(number, epoch)
    made.send(manifest, parts, LARGE)  # type: ignore[arg-type]
    asked: list[int] = []

    def write_anchor(whole: Manifest) -> None:
        asked.append(whole.number)
        if writes:
            store_at(where).add(anchor_of(whole), parts)

    made.settle(manifest, write_anchor, LARGE)
    return asked


def there(where: Path) -> list[str]:
    return [f"{a.kind} {a.number}" for a in store_at(where).artefacts()]


def test_versions_that_nobody_needs_go_and_what_a_killed_publisher_left(tmp_path: Path) -> None:
    made = opened(tmp_path, keep=2)
    made.claim(0)
    orphan = tmp_path / "run/0/v00000000/part-0009.0123456789abcdef"
    anchors = [publish(made, tmp_path, number) for number in range(2)]
    orphan.write_bytes(b"of a version that never was")
    anchors += [publish(made, tmp_path, number) for number in range(2, 8)]
    assert anchors == [[], [1], [], [3], [], [5], [], [7]]
    assert there(tmp_path) == ["anchor 5", "delta 6", "anchor 7", "delta 7"]
    assert not orphan.exists()


def test_anchors_are_looked_for_by_their_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store of many versions is not listed, but where something can be deleted."""
    made = opened(tmp_path, keep=100)
    made.claim(0)
    listed: list[str] = []
    read = LocalStore.list
    monkeypatch.setattr(LocalStore, "list", lambda self, prefix: listed.append(prefix) or read(self, prefix))
    anchors = [publish(made, tmp_path, number) for number in range(6)]
    assert anchors == [[], [1], [], [3], [], [5]] and listed == []


def test_an_anchor_that_is_not_there_yet_is_looked_for_again(tmp_path: Path) -> None:
    made = opened(tmp_path)
    made.claim(0)
    publish(made, tmp_path, 0)
    assert publish(made, tmp_path, 1, writes=False) == [1]
    assert publish(made, tmp_path, 2, writes=False) == [2]
    manifest, parts = version(1)
    store_at(tmp_path).add(anchor_of(manifest), parts)
    assert publish(made, tmp_path, 3) == [3], "two versions after the one that has come"
    assert there(tmp_path) == ["anchor 1", "delta 2", "anchor 3", "delta 3"]


def test_a_damaged_version_of_before_is_left_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = opened(tmp_path, anchor_every=100)
    made.claim(0)
    for number in range(3):
        publish(made, tmp_path, number)
    torn = tmp_path / "run/0/v00000001/manifest.json"
    torn.write_bytes(torn.read_bytes()[:40])
    made = opened(tmp_path, anchor_every=1)
    assert made.claim(0) == 1
    assert "0/v00000001 stays until somebody deletes it" in caplog.text and "torn" in caplog.text
    assert publish(made, tmp_path, 3, epoch=1) == [3]
    publish(made, tmp_path, 4, epoch=1)
    assert torn.exists() and not (tmp_path / "run/0/v00000002/manifest.json").exists()


def test_a_key_that_is_set_later(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = opened(tmp_path)
    made.claim(0)
    publish(made, tmp_path, 0)
    made = opened(tmp_path, key=KEY)
    assert made.claim(0) == 1
    assert "written without a key" in caplog.text and "0/v00000000 stays until somebody deletes it" in caplog.text
    manifest, parts = version(1, 1)
    manifest = sign(manifest, KEY)
    made.send(manifest, parts, LARGE)  # type: ignore[arg-type]
    newest = store_at(tmp_path, KEY).latest()
    assert newest is not None and (newest.epoch, newest.number) == (1, 1)


def busy(made: StoreTransport, method: str) -> list[int]:
    """The store refuses these calls while the list that is returned holds something."""
    refuses = [1]
    place = Flaky(LocalStore(Path(made._url)), lambda _, did, name: "503" if refuses and did == method and "latest" not in name else "")
    made._store.store = Patient(place, 1.0, tries=2)
    return refuses


def damaged_lease(made: StoreTransport, where: Path) -> None:
    made._store.put_lease(Lease("host-1", (), 0.0))
    lease = where / "run/leases/host-1"
    lease.write_bytes(lease.read_bytes()[:-1])


@pytest.mark.parametrize("fault", ["lease", "list", "delete"])
def test_housekeeping_that_fails_ends_no_run(fault: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = opened(tmp_path)
    made.claim(0)
    refuses: list[int] = []
    if fault == "lease":
        damaged_lease(made, tmp_path)
    else:
        refuses = busy(made, fault)
    for number in range(5):
        publish(made, tmp_path, number)
    assert "not all that is old could be deleted, the next version tries again" in caplog.text
    assert len(there(tmp_path)) == 7, "nothing is deleted"
    refuses.clear()
    (tmp_path / "run/leases/host-1").unlink(missing_ok=True)
    publish(made, tmp_path, 5)
    publish(made, tmp_path, 6)
    assert there(tmp_path) == ["anchor 5", "delta 6"]


def test_another_trainer_ends_the_run_all_the_same(tmp_path: Path) -> None:
    made, other = opened(tmp_path), opened(tmp_path)
    made.claim(0)
    other.claim(0)
    with pytest.raises(SplitBrain):
        publish(made, tmp_path, 0)


def test_what_is_left_of_the_time_is_all_that_a_store_gets(tmp_path: Path) -> None:
    made = opened(tmp_path)
    made.claim(0)
    now = [0.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds

    place = Flaky(LocalStore(tmp_path), lambda _, method, name: "503" if "part-" in name else "")
    made._place = made._store.store = Patient(place, 600.0, tries=10**6, clock=lambda: now[0], sleep=sleep)
    manifest, parts = version(0)
    with pytest.raises(Busy):
        made.send(manifest, parts[:2], LARGE, timeout_s=20.0)  # type: ignore[arg-type]
    assert now[0] < 45, "two parts at a time, whose waiting adds up"


# --- shared memory ----------------------------------------------------------------------------------------------------


@pytest.fixture
def shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(shared_folder, "SHARED_MEMORY", tmp_path)
    yield tmp_path


def on_host(run_id: str = "run") -> StoreTransport:
    made = transport.make(SyncConfig(transport="host", timeout_s=10), Path("unused"), run_id, None)
    assert isinstance(made, StoreTransport)
    return made


def test_shared_memory_is_this_user_s_and_holds_one_version(shared: Path) -> None:
    made = on_host()
    made.claim(0)
    folder = shared / "slime-weights-run"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    for number in range(3):
        publish(made, folder, number)
        assert there(folder) == [f"delta {number}"]
    made.close()
    assert not folder.exists()


def test_shared_memory_has_one_publisher(shared: Path) -> None:
    first, second = on_host(), on_host()
    first.claim(0)
    with pytest.raises(SplitBrain, match="another trainer of this host publishes run"):
        second.claim(0)
    second.close()
    assert (shared / "slime-weights-run").is_dir(), "it is the first one's"
    first.close()
    second.claim(0)
    second.close()


KILLED = """
import sys
from pathlib import Path
from slime.cluster import shared_folder
from slime.config import SyncConfig
from slime.sync import transport
shared_folder.SHARED_MEMORY = Path(sys.argv[1])
made = transport.make(SyncConfig(transport="host"), Path("unused"), "killed", None)
made.claim(0)
sys.stdout.write("claimed")
sys.stdout.flush()
sys.stdin.read()
"""


def test_what_a_killed_trainer_left_in_shared_memory_is_removed(shared: Path) -> None:
    """By the next process that needs a folder there, also one of another run."""
    child = subprocess.Popen([sys.executable, "-c", KILLED, str(shared)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdout is not None and child.stdin is not None and child.stdout.read(7) == b"claimed"
    left = shared / "slime-weights-killed"
    on_host("other").claim(0)
    assert (left / "in-use").is_file(), "its process lives"
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    child.stdin.close()
    child.stdout.close()
    assert left.is_dir()
    made = on_host("third")
    made.claim(0)
    assert not left.exists()
    made.close()


@pytest.mark.parametrize("lock", [True, False])
def test_the_run_s_own_folder_of_a_killed_start_is_replaced(shared: Path, lock: bool) -> None:
    """Also where it was killed before it had the lock."""
    left = shared / "slime-weights-run"
    (left / "run").mkdir(parents=True)
    if lock:
        (left / "in-use").touch()
    made = on_host()
    made.claim(0)
    assert not (left / "run/0").exists() and stat.S_IMODE(left.stat().st_mode) == 0o700
    made.close()


def test_a_folder_that_is_a_link_is_refused(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "precious").touch()
    (shared / "slime-weights-run").symlink_to(elsewhere)
    with pytest.raises(SplitBrain, match="or another user's"):
        on_host().claim(0)
    assert (elsewhere / "precious").exists()


def test_artefacts_of_a_listing_are_read_or_named(tmp_path: Path) -> None:
    weights = store_at(tmp_path)
    weights.claim(0)
    for number in range(2):
        weights.publish(*version(number))
    (tmp_path / "run/0/v00000000/manifest.json").write_text("{")
    damaged: dict[Artefact, str] = {}
    assert [m.number for m in weights.manifests(damaged)] == [1]
    assert list(damaged) == [Artefact(0, 0)] and "torn" in damaged[Artefact(0, 0)]
