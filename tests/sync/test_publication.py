"""Publications over engines that answer, fail, lose answers, die, in every order: none goes on with other weights than the rest."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slime.sync.publication import Action, Do, Phase, Publication
from slime.sync.states import Held, Holds, Receiver, Refused, Staged
from tests.sync.test_states import SIGNATURE, version

OLD, NEW = version(4), version(5)
GARBAGE = "f" * 32


class Fate(StrEnum):
    """What becomes of an action."""

    WELL = "well"
    REFUSED = "refused"  # nothing is done
    WRONG = "wrong"  # done wrongly, and said so
    LOST = "lost"  # done, the answer is lost
    DIES = "dies"  # done, then the engine dies


@dataclass
class Engine:
    """What the publication cannot see: the receiver and the bits of an engine."""

    receiver: Receiver
    live: str = OLD.root
    paused: bool = False
    dead: bool = False
    fenced: bool = False

    def do(self, action: Do, wrong: bool) -> bool:
        """Returns whether it succeeded, as the host agent would."""
        match action:
            case Do.PREPARE:
                if not wrong:
                    self.receiver.stage(NEW)
                return not wrong
            case Do.DROP:
                self.receiver.drop()
                return not wrong
            case Do.COMMIT:
                self.receiver.write(NEW.version)
                self.paused, self.live = True, GARBAGE if wrong else NEW.root
                return self.receiver.proof(self.live)
            case Do.UNDO:
                self.paused = True
                self.live = GARBAGE if wrong else OLD.root
                return self.receiver.undo(NEW.version, self.live)
            case Do.HEAL:
                self.paused = True
                self.receiver.reload()
                self.live = GARBAGE if wrong else NEW.root
                if not wrong:
                    self.receiver.adopted(Held.target(NEW))
                return not wrong
            case Do.RESUME:
                if wrong:
                    return False
                self.receiver.accept()
                self.paused = False
                return True
        raise AssertionError(action)

    @property
    def generates(self) -> bool:
        return not (self.paused or self.dead or self.fenced)


class Chooser(Protocol):
    def __call__(self, n: int) -> int:
        """One of n ways, 0 to n - 1."""
        ...


@dataclass
class World:
    publication: Publication
    engines: dict[str, Engine]
    snapshot: str = OLD.root
    due: list[Action] = field(default_factory=list)
    late: list[Action] = field(default_factory=list)  # answers that come when nobody waits for them

    def take(self, actions: list[Action]) -> None:
        for action in actions:
            if action.do is Do.FENCE:
                self.engines[action.engine].fenced = True
            elif action.do is Do.ACKNOWLEDGE:
                self.snapshot = NEW.root
            else:
                self.due.append(action)
        self.check()

    def check(self) -> None:
        """What must hold at every moment."""
        running = {e.live for e in self.engines.values() if e.generates}
        assert len(running) <= 1, "two engines go on with different versions"
        assert GARBAGE not in running, "an engine goes on with bits of no version"
        for engine in self.engines.values():
            assert not engine.generates or isinstance(engine.receiver.state, Holds | Staged), "it generates unproven"
        if self.snapshot == NEW.root:
            live = [self.engines[name].live for name in self.publication.live]
            assert set(live) <= {NEW.root}, "the snapshot is ahead of a live engine"

    def carry_out(self, action: Action, fate: Fate) -> None:
        engine = self.engines[action.engine]
        if engine.dead:
            return
        succeeded, why = False, "it said no"
        if fate is not Fate.REFUSED:
            try:
                succeeded = engine.do(action.do, wrong=fate is Fate.WRONG)
            except Refused as refused:
                why = str(refused)
        self.check()
        if fate is Fate.DIES:
            engine.dead = True
            engine.receiver.died()
            self.take(self.publication.died(action.engine, "signal 9"))
        elif fate is Fate.LOST:
            self.take(self.publication.failed(action, "no answer"))
            self.late.append(action)
        elif succeeded:
            self.take(self.publication.done(action))
        else:
            self.take(self.publication.failed(action, why))


def play(count: int, heal: bool, choose: Chooser, fates: tuple[Fate, ...], interrupts: bool = False) -> World:
    """One publication to its end; every choice is `choose`'s. With `interrupts` it may be told to give up at any moment."""
    names = [f"e{i}" for i in range(count)]
    engines = {name: Engine(Receiver(name, "run", SIGNATURE)) for name in names}
    for engine in engines.values():
        engine.receiver.adopted(Held.target(OLD))
    world = World(Publication(names, heal), engines)
    world.take(world.publication.begin())
    for _ in range(80 * count):
        if world.publication.ended:
            break
        if world.publication.phase is Phase.PREPARED:
            world.take(world.publication.abort("the run stops") if choose(4) == 3 else world.publication.commit())
            continue
        if interrupts and choose(10) == 9:
            world.take(world.publication.abort("the run stops"))
            continue
        assert world.due, f"it waits for nothing: {world.publication.phase}"
        action = world.due.pop(choose(len(world.due)))
        world.carry_out(action, fates[choose(len(fates))])
        for late in world.late:
            assert world.publication.done(late) == [], "an answer that was given up counts"
    ended(world)
    return world


def ended(world: World) -> None:
    publication = world.publication
    assert publication.phase in (Phase.DONE, Phase.ABORTED) and not publication.outstanding()
    target = NEW if publication.phase is Phase.DONE else OLD
    assert not publication.live or world.snapshot == target.root
    assert publication.acknowledged == (world.snapshot == NEW.root)
    for name, engine in world.engines.items():
        if name in publication.live:
            assert engine.generates and engine.live == target.root and engine.receiver.state == Holds(Held.target(target)), name
        else:
            assert engine.fenced and publication.fenced[name], name
    assert publication.phase is Phase.DONE or publication.reason


def every_choice(found: list[int]) -> Iterator[Chooser]:
    """Choosers that together make every sequence of choices; a play must follow each. `found` gets the number of plays."""
    prefix: list[int] = []
    while True:
        widths: list[int] = []

        def choose(n: int, widths: list[int] = widths, prefix: list[int] = prefix) -> int:
            widths.append(n)
            if len(widths) > len(prefix):
                prefix.append(0)
            return prefix[len(widths) - 1]

        yield choose
        found[0] += 1
        while prefix and prefix[-1] == widths[len(prefix) - 1] - 1:
            prefix.pop()
        if not prefix:
            return
        prefix[-1] += 1


@pytest.mark.parametrize("heal", [False, True])
def test_every_sequence_of_one_engine(heal: bool) -> None:
    phases, found = set(), [0]
    for choose in every_choice(found):
        phases.add(play(1, heal, choose, tuple(Fate)).publication.phase)
    assert phases == {Phase.DONE, Phase.ABORTED} and found[0] > 50


@pytest.mark.parametrize("heal", [False, True])
def test_every_sequence_of_two_engines(heal: bool) -> None:
    """With the fates that differ most, which keeps the number of sequences in reach."""
    ends, found = set(), [0]
    for choose in every_choice(found):
        world = play(2, heal, choose, (Fate.WELL, Fate.WRONG))
        ends.add((world.publication.phase, len(world.publication.live)))
    assert ends == {(phase, live) for phase in (Phase.DONE, Phase.ABORTED) for live in (0, 1, 2)} and found[0] > 500


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 5), st.booleans(), st.data())
def test_any_sequence(count: int, heal: bool, data: st.DataObject) -> None:
    play(count, heal, lambda n: data.draw(st.integers(0, n - 1)), (Fate.WELL, Fate.WELL, Fate.WELL, *Fate), interrupts=True)


# --- what is decided, case by case ------------------------------------------------------------------------------------


def to(phase: Phase, heal: bool = False, count: int = 3) -> Publication:
    """A publication of e0, e1, ... that has reached a phase without a fault."""
    publication = Publication([f"e{i}" for i in range(count)], heal)
    publication.begin()
    if phase is not Phase.PREPARING:
        for action in publication.outstanding():
            publication.done(action)
        publication.commit()
    if phase is Phase.PROVEN:
        for action in publication.outstanding():
            publication.done(action)
    assert publication.phase is phase
    return publication


def said(actions: list[Action]) -> str:
    return " ".join(f"{a.do}:{a.engine}" for a in actions)


def test_all_well() -> None:
    publication = Publication(["e0", "e1"])
    assert said(publication.begin()) == "prepare:e0 prepare:e1"
    assert publication.done(Action(Do.PREPARE, "e0")) == publication.done(Action(Do.PREPARE, "e1")) == []
    assert publication.phase is Phase.PREPARED and said(publication.commit()) == "commit:e0 commit:e1"
    assert publication.done(Action(Do.COMMIT, "e1")) == [] and not publication.acknowledged
    assert said(publication.done(Action(Do.COMMIT, "e0"))) == "resume:e0 resume:e1 acknowledge:"
    publication.done(Action(Do.RESUME, "e0"))
    publication.done(Action(Do.RESUME, "e1"))
    assert publication.phase is Phase.DONE and publication.acknowledged


def test_a_nack_in_prepare_drops_all_and_waits_for_the_slow() -> None:
    publication = to(Phase.PREPARING)
    publication.done(Action(Do.PREPARE, "e0"))
    assert said(publication.failed(Action(Do.PREPARE, "e1"), "part-0000 is cut")) == "drop:e0 drop:e1"
    assert said(publication.done(Action(Do.PREPARE, "e2"))) == "drop:e2"
    for engine in publication.live:
        publication.done(Action(Do.DROP, engine))
    assert publication.phase is Phase.ABORTED and publication.reason == "e1: prepare failed: part-0000 is cut"
    assert publication.live == ["e0", "e1", "e2"] and not publication.fenced


def test_a_mismatch_undoes_all_before_any_goes_on() -> None:
    publication = to(Phase.COMMITTING)
    publication.done(Action(Do.COMMIT, "e0"))
    assert said(publication.failed(Action(Do.COMMIT, "e1"), "mlp.up differs")) == "undo:e0 undo:e1"
    publication.done(Action(Do.UNDO, "e0"))
    publication.done(Action(Do.UNDO, "e1"))
    assert said(publication.done(Action(Do.COMMIT, "e2"))) == "undo:e2"
    assert said(publication.done(Action(Do.UNDO, "e2"))) == "resume:e0 resume:e1 resume:e2"


def test_a_failed_undo_fences_that_engine_alone() -> None:
    publication = to(Phase.COMMITTING, count=2)
    publication.failed(Action(Do.COMMIT, "e0"), "lost")
    publication.done(Action(Do.COMMIT, "e1"))
    publication.done(Action(Do.UNDO, "e1"))
    assert said(publication.failed(Action(Do.UNDO, "e0"), "it does not answer")) == "fence:e0 resume:e1"
    publication.done(Action(Do.RESUME, "e1"))
    assert publication.phase is Phase.ABORTED and publication.live == ["e1"]
    assert publication.fenced == {"e0": "e0: undo failed: it does not answer"}


def test_heal_loads_that_engine_alone() -> None:
    publication = to(Phase.COMMITTING, heal=True)
    publication.done(Action(Do.COMMIT, "e0"))
    assert said(publication.failed(Action(Do.COMMIT, "e1"), "mlp.up differs")) == "heal:e1"
    assert publication.done(Action(Do.COMMIT, "e2")) == []
    assert said(publication.done(Action(Do.HEAL, "e1"))) == "resume:e0 resume:e1 resume:e2 acknowledge:"


def test_an_engine_that_cannot_be_healed_is_left_behind() -> None:
    publication = to(Phase.COMMITTING, heal=True, count=2)
    publication.failed(Action(Do.COMMIT, "e1"), "mlp.up differs")
    publication.done(Action(Do.COMMIT, "e0"))
    assert said(publication.failed(Action(Do.HEAL, "e1"), "still differs")) == "fence:e1 resume:e0 acknowledge:"


@pytest.mark.parametrize("phase", [Phase.PREPARING, Phase.COMMITTING, Phase.PROVEN])
def test_the_dead_leave_the_quorum(phase: Phase) -> None:
    publication = to(phase)
    assert said(publication.died("e1", "signal 9")).startswith("fence:e1")
    assert publication.died("e1", "again") == [] and publication.live == ["e0", "e2"]
    if phase is Phase.PREPARING:
        for action in publication.outstanding():
            publication.done(action)
        publication.commit()
    while publication.outstanding():
        publication.done(publication.outstanding()[0])
    assert publication.phase is Phase.DONE and "signal 9" in publication.fenced["e1"]


@pytest.mark.parametrize("phase", [Phase.PREPARING, Phase.COMMITTING])
def test_without_a_live_engine_it_aborts(phase: Phase) -> None:
    publication = to(phase, count=1)
    publication.died("e0", "signal 9")
    assert (
        publication.phase is Phase.ABORTED
        and publication.deserted
        and not publication.acknowledged
        and "e0: it died: signal 9" in publication.reason
    )
    assert Publication([]).begin() == []


def test_answers_that_nobody_waits_for_are_ignored() -> None:
    publication = to(Phase.COMMITTING)
    publication.failed(Action(Do.COMMIT, "e1"), "no answer after 30 s")
    for late in (Action(Do.COMMIT, "e1"), Action(Do.PREPARE, "e0"), Action(Do.RESUME, "e0"), Action(Do.COMMIT, "e9")):
        assert publication.done(late) == [] and publication.failed(late, "late") == []
    assert publication.phase is Phase.ROLLING_BACK


def test_what_is_proven_is_not_given_up() -> None:
    publication = to(Phase.PROVEN)
    assert publication.abort("the run stops") == [] and publication.phase is Phase.PROVEN


def test_giving_up_while_an_engine_is_healed() -> None:
    """It has no old bits to write back: where that fails it is fenced."""
    publication = to(Phase.COMMITTING, heal=True, count=2)
    publication.failed(Action(Do.COMMIT, "e0"), "mlp.up differs")
    assert publication.abort("the run stops") == []
    assert said(publication.done(Action(Do.HEAL, "e0"))) == "undo:e0"
    assert said(publication.done(Action(Do.COMMIT, "e1"))) == "undo:e1"
    assert said(publication.failed(Action(Do.UNDO, "e0"), "it cannot undo")) == "fence:e0"
    assert said(publication.done(Action(Do.UNDO, "e1"))) == "resume:e1"
    publication.done(Action(Do.RESUME, "e1"))
    assert publication.phase is Phase.ABORTED and publication.live == ["e1"]
