"""What an engine holds, event by event, and what it refuses."""

from dataclasses import replace
from typing import Any

import pytest

from slime.sync.manifest import ANCHOR, NO_ROOT, Manifest, root_of
from slime.sync.states import Fenced, Held, Holds, Receiver, Refused, Staged, Stale, Written, describe
from slime.types import WeightVersion

SIGNATURE = "5" * 32


def version(number: int, **values: Any) -> Manifest:
    """Version `number`, of one tensor whose fingerprint is the number + 1."""
    made = {
        "run_id": "run",
        "epoch": 0,
        "number": number,
        "parent_epoch": 0 if number else -1,
        "parent_number": number - 1,
        "kind": "delta",
        "signature": SIGNATURE,
        "codec": "steps",
        "part_bytes": 1,
        "parts": (),
        "fingerprints": (number + 1,),
        "parent_root": root_of((number,)),
        "changed": (1,),
    }
    return Manifest(**made | values)


def receiver(number: int = -1) -> Receiver:
    made = Receiver("engine 0", "run", SIGNATURE)
    made.adopted(Held.model_directory("run", root_of((0,))) if number < 0 else Held.target(version(number)))
    return made


def bring(engine: Receiver, manifest: Manifest) -> None:
    engine.stage(manifest)
    engine.write(manifest.version)
    assert engine.proof(manifest.root)
    engine.accept()


def test_from_the_model_directory_through_versions() -> None:
    engine = receiver()
    for number in range(4):
        bring(engine, version(number))
        assert engine.state == Holds(Held.target(version(number))) and engine.held is not None and engine.held.label == f"run/0/{number}"
    bring(engine, version(4, epoch=1))
    assert engine.held == Held.target(version(4, epoch=1)), "a resumed run goes on from a version of the epoch before"


def test_a_fold_is_a_delta_over_several() -> None:
    engine = receiver(2)
    bring(engine, version(6, kind="fold", parent_number=2, parent_root=root_of((3,))))
    assert engine.held is not None and engine.held.order == (0, 6)


@pytest.mark.parametrize(
    ("manifest", "says"),
    [
        (version(7), r"engine 0 holds run/0/4 \(root .*\), but run/0/7 begins from run/0/6"),
        (version(5, run_id="other", parent_root=root_of((5,))), "engine 0 belongs to run run, the weights to run other"),
        (version(5, signature="6" * 32), "engine 0 serves a model of signature 55.*, run/0/5 is of 66"),
        (version(3), "run/0/3 .* is not newer"),
        (version(4, fingerprints=(9,)), "run/0/4 .* is not newer"),
        (version(5, parent_root=root_of((77,))), "but run/0/5 begins from run/0/4"),
        (version(0), "not newer"),
        (version(5, kind=ANCHOR, parent_epoch=-1, parent_number=-1, parent_root=NO_ROOT), "bring it there first, or load it whole"),
        (version(5, parent_epoch=-1, parent_number=-1), "begins from run/-1/-1"),
    ],
)
def test_deltas_that_are_refused(manifest: Manifest, says: str) -> None:
    engine = receiver(4)
    before = engine.state
    with pytest.raises(Refused, match=says):
        engine.stage(manifest)
    assert engine.state == before


def test_an_older_epoch_is_refused_whatever_its_number() -> None:
    engine = receiver()
    engine.reload()
    engine.adopted(Held.target(version(4, epoch=2)))
    with pytest.raises(Refused, match="not newer"):
        engine.stage(version(900, epoch=1))


def test_doing_it_twice_is_well() -> None:
    engine, target = receiver(4), version(5)
    for _ in range(2):
        engine.stage(target)
    for _ in range(2):
        engine.write(target.version)
    assert engine.held is None, "between two versions it generates with neither"
    for _ in range(2):
        assert engine.proof(target.root)
    for _ in range(2):
        engine.accept()
    engine.write(target.version)
    engine.stage(target)
    assert engine.state == Holds(Held.target(target)) and engine.proof(target.root)


def test_without_staging_nothing_is_written() -> None:
    engine = receiver(4)
    with pytest.raises(Refused, match="cannot commit run/0/5, which is not staged: it is at run/0/4"):
        engine.write(WeightVersion(0, 5, "run"))
    engine.stage(version(5))
    with pytest.raises(Refused, match="run/0/6, which is not staged: it is at run/0/4 with run/0/5 staged"):
        engine.write(WeightVersion(0, 6, "run"))
    engine.drop()
    engine.drop()
    with pytest.raises(Refused, match="not staged"):
        engine.write(WeightVersion(0, 5, "run"))


def test_another_version_replaces_what_is_staged() -> None:
    engine = receiver(4)
    engine.stage(version(5))
    again = version(5, epoch=1, fingerprints=(60,))
    engine.stage(again)
    assert engine.state == Staged(Held.target(version(4)), Held.target(again))


def test_an_unproven_engine_does_not_go_on() -> None:
    engine, target = receiver(4), version(5)
    engine.stage(target)
    with pytest.raises(Refused, match="cannot go on"):
        engine.accept()
    engine.write(target.version)
    with pytest.raises(Refused, match=r"cannot go on: it is between run/0/4 and run/0/5 \(unproven\)"):
        engine.accept()
    assert not engine.proof(version(4).root)
    with pytest.raises(Refused, match="cannot go on"):
        engine.accept()
    assert engine.undo(target.version, version(4).root) and engine.state == Holds(Held.target(version(4)))


@pytest.mark.parametrize("written", [False, True])
def test_undo(written: bool) -> None:
    engine, target = receiver(4), version(5)
    engine.stage(target)
    if written:
        engine.write(target.version)
        assert engine.proof(target.root)
    assert engine.undo(target.version, version(4).root) and engine.undo(target.version, version(4).root)
    assert engine.state == Holds(Held.target(version(4)))
    bring(engine, version(5, epoch=1))


def test_an_undo_that_restores_something_else_fences() -> None:
    engine, target = receiver(4), version(5)
    engine.stage(target)
    engine.write(target.version)
    assert not engine.undo(target.version, "0" * 32)
    assert engine.state == Fenced("undoing run/0/5 did not restore run/0/4") and engine.held is None


def test_a_version_that_runs_is_not_undone() -> None:
    engine = receiver(5)
    with pytest.raises(Refused, match="cannot undo run/0/5"):
        engine.undo(version(5).version, version(5).root)


def test_what_is_released_holds_nothing_until_it_is_loaded_and_proven() -> None:
    staged, written, fenced, stale = receiver(4), receiver(4), receiver(4), receiver(4)
    staged.stage(version(5))
    written.stage(version(5))
    written.write(version(5).version)
    fenced.died()
    stale.reload()
    for engine in (receiver(4), staged, written, fenced, stale):
        engine.released()
        assert engine.state == Stale("its memory was released") and engine.held is None
        with pytest.raises(Refused, match=r"engine 0 cannot stage run/0/5: it is stale \(its memory was released\)"):
            engine.stage(version(5))
        engine.adopted(Held.target(version(6)))
        assert engine.held == Held.target(version(6))


def test_death_fence_reload() -> None:
    engine = receiver(4)
    for fence in (engine.died, lambda: engine.fence("its undo failed")):
        fence()
        assert isinstance(engine.state, Fenced) and engine.held is None
        for event in (lambda: engine.stage(version(5)), engine.accept, engine.drop, lambda: engine.adopted(Held.target(version(4)))):
            with pytest.raises(Refused, match="fenced"):
                event()
        engine.reload()
        assert engine.state == Stale("it is being loaded anew") and engine.held is None
        for event in (
            lambda: engine.stage(version(5)),
            lambda: engine.write(version(5).version),
            lambda: engine.proof(version(5).root),
            lambda: engine.undo(version(5).version, version(4).root),
            engine.accept,
        ):
            with pytest.raises(Refused, match="stale"):
                event()
        with pytest.raises(Refused, match="belongs to run run, the weights to run other"):
            engine.adopted(Held(WeightVersion(0, 4, "other"), version(4).root))
        engine.adopted(Held.target(version(4)))
    bring(engine, version(5))


def test_states_in_words() -> None:
    a, b = Held.target(version(4)), Held.target(version(5))
    words = [describe(s) for s in (Stale("why"), Holds(a), Staged(a, b), Written(a, b), replace(Written(a, b), proven=True), Fenced("it"))]
    assert words[0] == "stale (why)" and words[-1] == "fenced (it)" and len(set(words)) == 6
