"""Stores of weights in a directory, in memory and in S3: every place keeps its word, one of two trainers publishes, what S3 says."""

import contextlib
import copy
import fcntl
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from slime.sync import store_local
from slime.sync.chain import Lease
from slime.sync.manifest import ANCHOR, FOLD, NO_ROOT, PartRef, sign
from slime.sync.places import Busy, Missing, Patient, Store
from slime.sync.store import Artefact, SplitBrain, WeightStore
from slime.sync.store_fsspec import MemoryStore, S3Store, open_store
from slime.sync.store_local import LocalStore
from tests.sync.stores import KEY, MODEL, VolatileFiles, version


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
        released = threading.Timer(0.3, fcntl.flock, (other, fcntl.LOCK_UN))
        released.start()
        with pytest.raises(Busy, match=r"\.lock: another writer has held this lock for 0\.1 s"):
            store.put_if("a", b"1", None)
        assert Patient(store).put_if("a", b"1", None)
        released.join()
    assert store.get("a", 1) == b"1"


def test_names_that_lead_elsewhere() -> None:
    for name in ("../x", "/etc/passwd", "a//b", "a/../b", "", ".hidden", "a/.hidden", "a b"):
        with pytest.raises(ValueError, match="not the name of a file"):
            LocalStore(Path("/weights"), VolatileFiles()).put(name, b"")


def test_places_that_cannot_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"sync.url=gs://b/p: gs:// has no conditional write"):
        open_store("gs://b/p")
    monkeypatch.setitem(sys.modules, "botocore.exceptions", None)
    with pytest.raises(ValueError, match=r"sync.url=s3://b/p: .*pip install 'slime-rl\[s3\]'"):
        open_store("s3://b/p")


def test_parts_are_named_by_their_content() -> None:
    assert PartRef.of(3, b"x").name != PartRef.of(3, b"y").name and PartRef.of(3, b"x").name.startswith("part-0003.")


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


# --- S3 ---------------------------------------------------------------------------------------------------------------


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
