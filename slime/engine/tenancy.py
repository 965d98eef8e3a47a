"""Who has the memory of a host's devices where engines and trainer have it in turn (cluster.share=swap): a state machine without I/O.

The devices are the engines' from the start on. `leave` and `enter` come from the driver, everything else from the host agent, which does
the `Do`s that are due and tells what became of them. Where an engine is:

    GONE      it has no process, and so no memory
    STARTING  a process comes up
    RESIDENT  it has its memory; health.py says whether it holds the committed weights
    LEAVING   it has been asked to give up its memory
    AWAY      it has
    COMING    it takes its memory back, and is brought to the committed weights

                  GONE         STARTING      RESIDENT          LEAVING       AWAY            COMING
    leave         -            KILL          LEAVING, RELEASE  KILL          -               KILL
    enter         -            -             -                 -             COMING, RESUME  -
    may_start     STARTING     -             -                 -             -               -             while they are the engines'
    started       -            RESIDENT      -                 -             -               -
    released      -            -             -                 AWAY          -               -
    came          -            -             -                 -             -               RESIDENT
    failed        -            KILL          -                 KILL          -               KILL
    ended         GONE         GONE          GONE              GONE          GONE            GONE

The devices are `free` for the trainer once every engine is AWAY or GONE. What cannot be asked, does not answer or fails is killed, and GONE
when the kernel has its process no more: no answer is ever taken for memory that is free. While the devices are the trainer's no process is
started: what ends then stays GONE, and is started anew after `enter`. A KILL that is due is due until `ended`.

An engine dies while it gives up its memory, another while the trainer works:

    leave()            RELEASE 0, RELEASE 1      both LEAVING
    released(1)                                  1 AWAY
    failed(0)          KILL 0
    ended(0)                                     0 GONE: the devices are free
    ended(1)                                     1 GONE; may_start(1) is False
    enter()            nothing                   may_start(0) and may_start(1) are True
"""

from enum import StrEnum


class Place(StrEnum):
    GONE = "gone"
    STARTING = "starting"
    RESIDENT = "resident"
    LEAVING = "leaving"
    AWAY = "away"
    COMING = "coming"


class Do(StrEnum):
    RELEASE = "release"  # pause it, and let it give up its memory
    RESUME = "resume"  # let it take its memory back, and bring it to the committed weights
    KILL = "kill"  # end its whole process group, and see that it is gone


class Tenancy:
    """The engines of one host, by name."""

    def __init__(self) -> None:
        self.ours = True  # the devices are the engines', or about to be
        self._places: dict[str, Place] = {}

    def add(self, engine: str) -> None:
        """One more, whose process has been started."""
        assert self.ours, "nothing is started on devices that are the trainer's"
        self._places[engine] = Place.RESIDENT

    def place(self, engine: str) -> Place:
        return self._places[engine]

    def resident(self, engine: str) -> bool:
        """Whether it has memory that weights may be loaded into."""
        return self._places[engine] is Place.RESIDENT

    @property
    def free(self) -> bool:
        """Whether no engine has any memory, nor will before `enter`."""
        return not self.ours and all(place in (Place.AWAY, Place.GONE) for place in self._places.values())

    def leave(self) -> dict[str, Do]:
        """The trainer wants the devices; what is due, by engine. Again: what is still due of it."""
        self.ours = False
        due = {}
        for engine, place in self._places.items():
            if place is Place.RESIDENT:
                self._places[engine] = Place.LEAVING
                due[engine] = Do.RELEASE
            elif place in (Place.STARTING, Place.COMING, Place.LEAVING):  # of LEAVING nobody knows any more what it was asked
                due[engine] = Do.KILL
        return due

    def enter(self) -> dict[str, Do]:
        """The trainer has given up the devices; what is due, by engine. They must have been `free`, or never been left."""
        assert self.ours or self.free, f"engines still leave: {self._places}"
        self.ours = True
        due = {engine: Do.RESUME for engine, place in self._places.items() if place is Place.AWAY}
        self._places |= dict.fromkeys(due, Place.COMING)
        return due

    def may_start(self, engine: str) -> bool:
        """Whether a new process of an engine that is GONE may be started; if so, it is STARTING."""
        if not self.ours or self._places[engine] is not Place.GONE:
            return False
        self._places[engine] = Place.STARTING
        return True

    def started(self, engine: str) -> None:
        """Its new process answers."""
        self._go(engine, Place.STARTING, Place.RESIDENT)

    def released(self, engine: str) -> None:
        """It has given up its memory."""
        self._go(engine, Place.LEAVING, Place.AWAY)

    def came(self, engine: str) -> None:
        """It has its memory, and holds the committed weights."""
        self._go(engine, Place.COMING, Place.RESIDENT)

    def failed(self, engine: str) -> Do | None:
        """What it was asked failed, or nobody knows; what is due."""
        return Do.KILL if self._places[engine] in (Place.STARTING, Place.LEAVING, Place.COMING) else None

    def ended(self, engine: str) -> None:
        """The kernel has none of its processes any more."""
        self._places[engine] = Place.GONE

    def _go(self, engine: str, before: Place, after: Place) -> None:
        """Unless it has ended meanwhile."""
        if self._places[engine] is before:
            self._places[engine] = after
