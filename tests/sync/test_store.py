"""Stores of weights: order of writes under loss of power, damage, flaky services, two trainers, forgery; a directory, memory, S3."""

import contextlib
import copy
import fcntl
import itertools
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slime.sync import store_local
from slime.sync.chain import Lease
from slime.sync.manifest import ANCHOR, FOLD, NO_ROOT, ManifestError, PartRef, sign
from slime.sync.places import Busy, Missing, Patient, Store
from slime.sync.store import Artefact, SplitBrain, WeightStore
from slime.sync.store_fsspec import MemoryStore, S3Store, open_store
from slime.sync.store_local import Files, LocalStore
from tests.sync.stores import KEY, MODEL, Flaky, FullDisk, PowerLoss, VolatileFiles, version

ROOT = Path("/weights")


@pytest.fixture(scope="module")
def s3() -> Iterator[S3Store]:
    """A bucket of an S3 server."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    settings = {"AWS_ENDPOINT_URL": url, "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_REGION": "us-east-1"}
    server = subprocess.Popen([sys.executable, "-m", "moto.server", "-p", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in settings.items():
                patch.setenv(name, value)
            _wait(url)
            bucket = S3Store("weights")
            bucket._fs.call_s3("create_bucket", Bucket="weights")
            yield bucket
    finally:
        server.kill()
        server.wait()


def _wait(url: str) -> None:
    for _ in range(200):
        try:
            urllib.request.urlopen(f"{url}/moto-api/", timeout=1).close()
            return
        except urllib.error.HTTPError:
            return
        except OSError:
            time.sleep(0.05)
    raise AssertionError("moto's server does not answer")


@pytest.fixture(params=["directory", "memory", pytest.param("s3", marks=pytest.mark.e2e)])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "s3":
        return Patient(folder_of(request.getfixturevalue("s3")), 20)
    return open_store(str(tmp_path) if request.param == "directory" else f"memory://{uuid.uuid4().hex}", timeout_s=20)


def folder_of(bucket: S3Store) -> S3Store:
    """A new folder, through the bucket's connection, which takes long to make."""
    store = copy.copy(bucket)
    store._root = f"weights/{uuid.uuid4().hex}"
    return store


# --- every place keeps its word ---------------------------------------------------------------------------------------


def test_files_come_and_go(store: Store) -> None:
    assert store.list("") == [] and not store.exists("a/b")
    for name, data in (("a/b", b"one"), ("a/c.json", b""), ("d", bytes(range(256)))):
        store.put(name, data)
        store.put(name, data)
        assert store.get(name, len(data)) == data and store.exists(name)
    assert store.list("") == ["a/b", "a/c.json", "d"] and store.list("a") == ["a/b", "a/c.json"] and store.list("zz") == []
    store.delete("a/b")
    store.delete("a/b")
    assert not store.exists("a/b") and store.list("a") == ["a/c.json"]
    with pytest.raises(Missing, match="a/b"):
        store.get("a/b", 9)
    with pytest.raises(ValueError, match="has 256 bytes, at most 255 are expected"):
        store.get("d", 255)


def test_a_conditional_write(store: Store) -> None:
    assert not store.put_if("run/latest", b"two", b"one")
    assert store.put_if("run/latest", b"one", None) and not store.put_if("run/latest", b"other", None)
    assert not store.put_if("run/latest", b"other", b"two") and store.get("run/latest", 9) == b"one"
    assert store.put_if("run/latest", b"two", b"one") and store.get("run/latest", 9) == b"two"


def test_one_of_many_writers_wins(store: Store) -> None:
    won: list[int] = []
    store.put_if("latest", b"start", None)

    def write(i: int) -> None:
        if store.put_if("latest", f"writer {i}".encode(), b"start"):
            won.append(i)

    threads = [threading.Thread(target=write, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1 and store.get("latest", 99) == f"writer {won[0]}".encode()


def test_versions_come_and_go(store: Store) -> None:
    weights = WeightStore(store, "run", KEY)
    assert weights.latest() is None and weights.claim(0)[0] == 0 and weights.latest() is None
    for number in range(3):
        manifest, parts = version(number)
        weights.publish(sign(manifest, KEY), parts)
        found = weights.latest()
        assert found is not None and (found.number, found.root) == (number, manifest.root)
        assert weights.parts(weights.manifest(Artefact(0, number))) == parts
    weights.put_model(MODEL)
    assert weights.model(MODEL.signature) == MODEL
    anchor, parts = version(2, kind=ANCHOR, parent_epoch=-1, parent_number=-1, parent_root=NO_ROOT)
    fold, _ = version(2, kind=FOLD, parent_number=0)
    for made in (anchor, fold):
        weights.add(sign(made, KEY), parts)
    kinds = [(m.number, m.kind, m.parent_number) for m in weights.manifests()]
    assert kinds == [(0, "delta", -1), (1, "delta", 0), (2, "anchor", -1), (2, "delta", 1), (2, "fold", 0)]
    weights.remove(weights.manifest(Artefact(0, 2, ANCHOR)))
    assert len(list(weights.manifests())) == 4 and weights.parts(weights.manifest(Artefact.of(fold))) == parts
    assert not [name for name in store.list("run") if "anchor" in name]
    weights.put_lease(Lease("host-1", ("a", "b"), 12.5))
    assert weights.leases() == [Lease("host-1", ("a", "b"), 12.5)]
    weights.drop_lease("host-1")
    assert weights.leases() == []


def test_a_lock_that_another_keeps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as one on a host that hangs: the store is busy, and Patient asks again."""
    monkeypatch.setattr(store_local, "LOCK_S", 0.1)
    store = LocalStore(tmp_path)
    with (tmp_path / ".lock").open("ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        released = threading.Timer(1.0, fcntl.flock, (other, fcntl.LOCK_UN))
        released.start()
        with pytest.raises(Busy, match=r"\.lock: another writer has held this lock for 0\.1 s"):
            store.put_if("a", b"1", None)
        assert Patient(store).put_if("a", b"1", None)
        released.join()
    assert store.get("a", 1) == b"1"


def test_names_that_lead_elsewhere() -> None:
    for name in ("../x", "/etc/passwd", "a//b", "a/../b", "", ".hidden", "a/.hidden", "a b"):
        with pytest.raises(ValueError, match="not the name of a file"):
            LocalStore(ROOT, VolatileFiles()).put(name, b"")


def test_places_that_cannot_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"sync.url=gs://b/p: gs:// has no conditional write"):
        open_store("gs://b/p")
    monkeypatch.setitem(sys.modules, "botocore.exceptions", None)
    with pytest.raises(ValueError, match=r"sync.url=s3://b/p: .*pip install 'slime-rl\[s3\]'"):
        open_store("s3://b/p")


# --- loss of power, kill, full disk (delta.md 4: 1, 5, 9, 15) ---------------------------------------------------------


def publish_two(files: Files, key: bytes | None = KEY) -> None:
    weights = WeightStore(LocalStore(ROOT, files), "run", key)
    weights._each = lambda call, count: [call(i) for i in range(count)]  # type: ignore[method-assign] # one after the other
    weights.claim(0)
    weights.put_model(MODEL)
    for number in range(2):
        manifest, parts = version(number)
        weights.publish(sign(manifest, KEY), parts)


def check_found(files: VolatileFiles) -> int:
    """The newest version that is found, all of it proven; -1 for none."""
    weights = WeightStore(LocalStore(ROOT, files), "run", KEY)
    for manifest in weights.manifests():
        assert weights.parts(manifest) == version(manifest.number)[1], "a manifest without its bytes"
    found = weights.latest()
    if found is None:
        return -1
    manifest = weights.manifest(Artefact(found.epoch, found.number))
    assert manifest.root == found.root
    return found.number


STEPS = VolatileFiles()
publish_two(STEPS)


@pytest.mark.parametrize("dies_at", range(len(STEPS.steps) + 1))
def test_power_is_lost_before_any_step(dies_at: int) -> None:
    """Whatever was not made durable is lost or kept, torn or whole: nothing of half a version is ever read, and going on succeeds."""
    newest = set()
    for keeps, torn in itertools.product((True, False), (lambda data: data, lambda data: data[: len(data) // 2], lambda _: b"")):
        files = VolatileFiles(dies_at)
        with contextlib.suppress(PowerLoss):
            publish_two(files)
        found = files.after(lambda _, keeps=keeps: keeps, torn)
        newest.add(check_found(found))
        go_on(found)
    if dies_at == len(STEPS.steps):
        assert newest == {1}, "what publish returned for is durable"
    assert len(newest) <= 2


def go_on(files: VolatileFiles) -> None:
    """A resumed trainer publishes the next version in a new epoch."""
    weights = WeightStore(LocalStore(ROOT, files), "run", KEY)
    epoch, before = weights.claim(1)
    number = before.number + 1
    manifest, parts = version(number, epoch, parent_epoch=before.epoch)
    weights.publish(sign(manifest, KEY), parts)
    found = WeightStore(LocalStore(ROOT, files), "run", KEY).latest()
    assert found is not None and (found.epoch, found.number) == (epoch, number)


@settings(max_examples=150, deadline=None)
@given(st.integers(0, len(STEPS.steps)), st.data())
def test_any_part_of_what_is_not_durable_survives(dies_at: int, data: st.DataObject) -> None:
    files = VolatileFiles(dies_at)
    with contextlib.suppress(PowerLoss):
        publish_two(files)
    found = files.after(lambda _: data.draw(st.booleans()), lambda bits: bits[: data.draw(st.integers(0, len(bits)))])
    check_found(found)
    go_on(found)


def test_the_simulation_catches_a_missing_fsync() -> None:
    """Without a sync of the bytes, or of the directory, the tests above would fail."""

    class NoSync(VolatileFiles):
        def sync(self, path: Path) -> None:
            self._step(f"none {path}")

    files = NoSync()
    publish_two(files)
    with pytest.raises((ManifestError, AssertionError)):
        check_found(files.after(lambda _: True, lambda _: b""))

    class NoDirectorySync(VolatileFiles):
        def sync_directory(self, path: Path) -> None:
            self._step(f"none {path}")
            self.durable_directories |= self.directories

    files = NoDirectorySync()
    publish_two(files)
    with pytest.raises((ManifestError, Missing)):
        check_found(files.after(lambda name: name.endswith("latest"), lambda data: data))


def test_the_pointer_comes_last() -> None:
    """Order of the names that appear: parts, manifest, pointer."""
    names = [Path(step.split()[2]).name for step in STEPS.steps if step.startswith("rename") and "model" not in step.split()[2]]
    kinds = ["part" if name.startswith("part-") else name for name in names]
    assert kinds == ["latest", *["part", "part", "manifest.json", "latest"] * 2]


@pytest.mark.parametrize("room", range(0, 1400, 100))
def test_a_full_disk(tmp_path: Path, room: int) -> None:
    files = FullDisk(room)
    manifest, parts = version(0)
    try:
        weights = WeightStore(LocalStore(tmp_path, files), "run")
        weights.claim(0)
        weights.publish(manifest, parts)
    except OSError as error:
        assert "No space left" in str(error) and not list(tmp_path.rglob(".tmp-*")), "it leaves its room to others"
        assert WeightStore(LocalStore(tmp_path), "run").latest() is None
        files.room = 1 << 20
        again = WeightStore(LocalStore(tmp_path, files), "run")
        again.claim(0)
        manifest, parts = version(0, epoch=again.claim(1)[0])
        again.publish(manifest, parts)
    assert WeightStore(LocalStore(tmp_path), "run").latest() is not None


def test_a_killed_publisher_s_parts_are_swept(tmp_path: Path) -> None:
    weights = WeightStore(LocalStore(tmp_path), "run")
    weights.claim(0)
    for number in range(3):
        weights.publish(*version(number))
    for number in (1, 2):
        (tmp_path / f"run/0/v{number:08d}/manifest.json").unlink()
    swept = weights.sweep(before=(0, 2))
    assert len(swept) == 2 and all(name.startswith("run/0/v00000001/part-") for name in swept)
    assert sorted(p.name for p in (tmp_path / "run/0/v00000001").iterdir()) == []
    assert len(list((tmp_path / "run/0/v00000002").iterdir())) == 2, "what may still be written is left alone"


# --- damage and forgery (2, 3, 4, 18) ---------------------------------------------------------------------------------


@pytest.fixture
def published(tmp_path: Path) -> WeightStore:
    weights = WeightStore(LocalStore(tmp_path), "run", KEY)
    weights.claim(0)
    for number in range(2):
        manifest, parts = version(number)
        weights.publish(sign(manifest, KEY), parts)
    return weights


def read_all(weights: WeightStore) -> None:
    found = WeightStore(weights.store, "run", KEY).latest()
    assert found is not None
    for number in range(2):
        weights.parts(weights.manifest(Artefact(0, number)))


def test_every_cut_and_flip_is_noticed(published: WeightStore, tmp_path: Path) -> None:
    files = [p for p in tmp_path.rglob("*") if p.is_file() and p.name != ".lock"]
    assert len(files) == 7
    for path in files:
        whole = path.read_bytes()
        for damaged in (
            whole[:-1],
            whole[: len(whole) // 2],
            b"",
            whole + b"\0",
            *(flipped(whole, bit) for bit in range(0, 8 * len(whole), 61)),
        ):
            path.write_bytes(damaged)
            with pytest.raises((ManifestError, ValueError)) as raised:
                read_all(published)
            assert path.name in str(raised.value), f"{raised.value}: names the file"
        path.write_bytes(whole)
        read_all(published)
        path.unlink()
        with pytest.raises((Missing, AssertionError)):
            read_all(published)
        path.write_bytes(whole)


def flipped(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def test_a_manifest_of_another_place_is_no_manifest(published: WeightStore, tmp_path: Path) -> None:
    """A replay: a genuine, signed file of an older version, or of another run, where a newer one should be."""
    newer = tmp_path / "run/0/v00000001/manifest.json"
    genuine = newer.read_bytes()
    shutil.copy(tmp_path / "run/0/v00000000/manifest.json", newer)
    with pytest.raises(ManifestError, match="it is the delta of run/0/0: a replay"):
        published.manifest(Artefact(0, 1))
    other, _ = version(1, run_id="other")
    newer.write_text(sign(other, KEY).to_json())
    with pytest.raises(ManifestError, match="it is the delta of other/0/1: a replay"):
        published.manifest(Artefact(0, 1))
    newer.write_bytes(genuine)
    for forged, says in (
        (sign(version(1)[0], b"somebody else's key"), "is not this key's"),
        (version(1)[0], "not signed"),
        (replace(sign(version(1)[0], KEY), fingerprints=(9, 9)), "altered or forged"),
    ):
        newer.write_text(forged.to_json())
        with pytest.raises(ManifestError, match=says):
            published.manifest(Artefact(0, 1))


def test_an_older_pointer_is_a_replay(published: WeightStore, tmp_path: Path) -> None:
    pointer = tmp_path / "run/latest"
    older = pointer.read_bytes()
    manifest, parts = version(2)
    published.publish(sign(manifest, KEY), parts)
    assert published.latest() is not None
    pointer.write_bytes(older)
    with pytest.raises(ManifestError, match=r"run/latest: leads to 0/1, but \(0, 2\) was there: a replay"):
        published.latest()


def test_a_pointer_of_another_run_or_key(published: WeightStore, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    shutil.copy(tmp_path / "run/latest", tmp_path / "other/latest")
    for weights in (
        WeightStore(published.store, "other", KEY),
        WeightStore(published.store, "run", KEY + b"x"),
        WeightStore(published.store, "run"),
    ):
        with pytest.raises(ManifestError, match="damaged or forged"):
            weights.latest()
        with pytest.raises(ManifestError, match="damaged or forged"):
            weights.claim(1)


def test_lengths_that_are_too_large_are_not_read(tmp_path: Path) -> None:
    """A manifest that declares a huge part allocates nothing; a part larger than declared is not read."""
    weights = WeightStore(LocalStore(tmp_path), "run")
    weights.claim(0)
    weights.publish(*version(0))
    manifest = weights.manifest(Artefact(0, 0))
    huge = replace(manifest, parts=tuple(replace(part, nbytes=1 << 41) for part in manifest.parts))
    with pytest.raises(ManifestError, match=r"has \d+ bytes instead of 2199023255552: it is cut"):
        weights.part(huge, 0)
    path = tmp_path / f"run/0/v00000000/{manifest.parts[0].name}"
    os.truncate(path, 1 << 40)
    with pytest.raises(ValueError, match="has 1099511627776 bytes, at most"):
        weights.part(manifest, 0)


def test_parts_that_are_not_the_manifest_s_are_not_published(tmp_path: Path) -> None:
    weights = WeightStore(LocalStore(tmp_path), "run")
    weights.claim(0)
    manifest, parts = version(0)
    for wrong, says in (([parts[1], parts[0]], "altered|cut"), (parts[:1], "1 parts given, the manifest names 2")):
        with pytest.raises(ManifestError, match=says):
            weights.publish(manifest, wrong)
    assert weights.latest() is None and weights.store.list("run/0") == []


# --- two trainers (17) ------------------------------------------------------------------------------------------------


def test_who_claimed_last_publishes(store: Store) -> None:
    old, new = (WeightStore(store, "run", publisher=name) for name in ("old", "new"))
    assert old.claim(0)[0] == 0
    old.publish(*version(0))
    epoch, before = new.claim(0)
    assert epoch == 1 and (before.number, before.publisher) == (0, old.publisher)
    with pytest.raises(SplitBrain, match=rf"{new.publisher} publishes this run; {old.publisher} must stop"):
        old.publish(*version(1))
    found = new.latest()
    assert found is not None and (found.epoch, found.number) == (0, 0), "the loser's version is not the newest"
    new.publish(*version(1, epoch, parent_epoch=0))
    found = new.latest()
    assert found is not None and (found.epoch, found.number) == (1, 1)


def test_two_claim_at_one_moment() -> None:
    store = MemoryStore(uuid.uuid4().hex)
    one, two = (WeightStore(store, "run", publisher=name) for name in ("one", "two"))
    read, raw = two._raw_pointer, two._raw_pointer()
    one.claim(0)
    two._raw_pointer = lambda: raw  # type: ignore[method-assign] # it read before one wrote
    with pytest.raises(SplitBrain):
        two.claim(0)
    two._raw_pointer = read  # type: ignore[method-assign]
    assert two.claim(0)[0] == 1


def test_one_version_is_published_once() -> None:
    store = MemoryStore(uuid.uuid4().hex)
    one, two = (WeightStore(store, "run", publisher=name) for name in ("one", "two"))
    one.claim(0)
    one.publish(*version(0))
    two._pointer = one._pointer  # as if the pointer could be shared
    other, parts = version(0, created_s=5.0)
    with pytest.raises(SplitBrain, match=rf"another trainer has published run/0/0; {two.publisher} must stop"):
        two.publish(other, parts)
    one.publish(*version(0))  # again, after a lost answer: well
    assert two.manifest(Artefact(0, 0)).created_s == 0.0


# --- services that are not well (14) ----------------------------------------------------------------------------------


def patient(store: Store, tries: int = 8) -> tuple[Patient, list[float]]:
    now = [0.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds

    return Patient(store, 60.0, tries, lambda: now[0], sleep), now


@pytest.mark.parametrize("fate", ["503", "lost"])
@pytest.mark.parametrize("phase", range(3))
def test_a_busy_service_is_asked_again(fate: str, phase: int) -> None:
    """Two of three calls fail, those whose answer is lost after they were carried out."""
    store, _ = patient(Flaky(MemoryStore(uuid.uuid4().hex), lambda call, _method, _name: fate if call % 3 != phase else ""), tries=40)
    weights = WeightStore(store, "run", KEY)
    weights.claim(0)
    for number in range(3):
        manifest, parts = version(number)
        weights.publish(sign(manifest, KEY), parts)
    found = weights.latest()
    assert found is not None and found.number == 2 and len(list(weights.manifests())) == 3


def test_a_service_that_stays_busy() -> None:
    store, now = patient(Flaky(MemoryStore(uuid.uuid4().hex), lambda *_: "503"), tries=1000)
    with pytest.raises(Busy, match=r"cannot write a: a: 503 Slow Down \(\d+ tries, at most 60 s\)"):
        store.put("a", b"")
    assert 50 < now[0] <= 60
    store, now = patient(Flaky(MemoryStore(uuid.uuid4().hex), lambda *_: "503"))
    with pytest.raises(Busy, match=r"\(8 tries"):
        store.get("a", 1)


def test_a_manifest_that_does_not_show_at_once() -> None:
    place = MemoryStore(uuid.uuid4().hex)
    writer = WeightStore(place, "run")
    writer.claim(0)
    writer.publish(*version(0))
    missing = [0]

    def window(_call: int, _method: str, name: str) -> str:
        missing[0] += name.endswith("manifest.json")
        return "404" if name.endswith("manifest.json") and missing[0] < 4 else ""

    store, now = patient(Flaky(place, window))
    reader = WeightStore(store, "run")
    assert reader.latest() is not None
    assert reader.manifest(Artefact(0, 0)).label == "run/0/0" and now[0] > 0
    with pytest.raises(Missing, match="v00000007"):
        reader.manifest(Artefact(0, 7))


def test_a_listing_is_never_believed() -> None:
    """It lacks what is new and shows what is gone."""
    place = MemoryStore(uuid.uuid4().hex)
    writer = WeightStore(place, "run")
    writer.claim(0)
    for number in range(2):
        writer.publish(*version(number))

    class Stale(Flaky):
        def list(self, prefix: str) -> list[str]:
            return ["run/0/v00000000/manifest.json", "run/0/v00000005/manifest.json"]

    reader = WeightStore(Stale(place, lambda *_: ""), "run")
    found = reader.latest()
    assert found is not None and reader.manifest(Artefact(found.epoch, found.number)).number == 1
    assert [m.number for m in reader.manifests()] == [0]


def test_a_manifest_before_its_parts_is_noticed(tmp_path: Path) -> None:
    weights = WeightStore(LocalStore(tmp_path), "run")
    manifest, parts = version(0)
    weights.store.put("run/0/v00000000/manifest.json", manifest.to_json().encode())
    weights.store.put(f"run/0/v00000000/{manifest.parts[0].name}", parts[0])
    with pytest.raises(Missing, match=re.escape(manifest.parts[1].name)):
        weights.parts(weights.manifest(Artefact(0, 0)))


@pytest.mark.e2e
def test_a_cut_upload_is_not_there(s3: S3Store) -> None:
    """A multipart upload of which a part was sent and that never ended."""
    store = folder_of(s3)
    bucket, _, key = store._path("run/0/v00000000/part-0000.0123456789abcdef").partition("/")
    upload = store._fs.call_s3("create_multipart_upload", Bucket=bucket, Key=key)
    store._fs.call_s3("upload_part", Bucket=bucket, Key=key, PartNumber=1, UploadId=upload["UploadId"], Body=b"x" * (5 << 20))
    assert store.list("run") == [] and not store.exists("run/0/v00000000/part-0000.0123456789abcdef")


def test_an_s3_server_that_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (
        ("ENDPOINT_URL", "http://127.0.0.1:9"),
        ("ACCESS_KEY_ID", "a"),
        ("SECRET_ACCESS_KEY", "b"),
        ("REGION", "us-east-1"),
    ):
        monkeypatch.setenv(f"AWS_{name}", value)
    store = open_store("s3://weights/x")._store
    for call in (lambda: store.put("a", b""), lambda: store.get("a", 1), lambda: store.put_if("a", b"", None), lambda: store.list("")):
        with pytest.raises(Busy, match=r"s3://weights/x/"):
            call()


def test_parts_are_named_by_their_content() -> None:
    assert PartRef.of(3, b"x").name != PartRef.of(3, b"y").name and PartRef.of(3, b"x").name.startswith("part-0003.")


@pytest.mark.e2e
@pytest.mark.parametrize("code", ["SlowDown", "ServiceUnavailable", "InternalError", "503", "RequestTimeout", "ConditionalRequestConflict"])
def test_what_s3_says_when_it_is_busy(s3: S3Store, code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from botocore.exceptions import ClientError
    from s3fs.errors import translate_boto_error

    def says(*_: object, **__: object) -> None:
        answer = ClientError({"Error": {"Code": code, "Message": "no"}, "ResponseMetadata": {"HTTPStatusCode": 503}}, "PutObject")
        raise translate_boto_error(answer) from answer

    store = folder_of(s3)
    for method in ("pipe_file", "call_s3", "info", "find"):
        monkeypatch.setattr(store._fs, method, says)
    for call in (lambda: store.put("a", b""), lambda: store.get("a", 1), lambda: store.put_if("a", b"", None), lambda: store.list("")):
        with pytest.raises(Busy):
            call()


@pytest.mark.e2e
def test_what_s3_refuses_is_not_asked_again(s3: S3Store) -> None:
    store = copy.copy(s3)
    store._root = "no-such-bucket/x"
    for call in (lambda: store.put("a", b""), lambda: store.put_if("a", b"", b"x"), lambda: store.get("a", 1)):
        with contextlib.suppress(Missing):
            assert not call()
    with pytest.raises(Missing, match="bucket does not exist"):
        store.put("a", b"")
