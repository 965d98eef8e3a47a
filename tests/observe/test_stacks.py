"""A picture of all threads names what each waits in."""

import asyncio
import subprocess
import sys
import threading

from slime.checkpoint.saver import Saver
from slime.observe.stacks import AT_REST, Stacks, awaits
from slime.rollout.groups import together


def waits_in_a_test(event: threading.Event) -> None:
    event.wait()


def test_every_other_thread_is_shown_with_its_innermost_frames(tmp_path) -> None:
    event = threading.Event()
    thread = threading.Thread(target=waits_in_a_test, args=(event,), name="waiter")
    thread.start()
    try:
        text = Stacks.now().text
    finally:
        event.set()
        thread.join()
    assert "thread waiter:" in text and "waits_in_a_test" in text and "event.wait()" in text
    assert text.index("waits_in_a_test") < text.rindex("in wait"), "innermost last"
    assert "_current_frames" not in text, "the thread that looks is left out"


def test_frames_of_slime_are_named(tmp_path) -> None:
    begun, event = threading.Event(), threading.Event()

    def rest(directory) -> None:
        begun.set()
        event.wait()

    class Never:
        def done(self) -> bool:
            return True

        def result(self, timeout_s: float):
            raise OSError

    saver = Saver(tmp_path, 1, 0, 1.0)
    before = Stacks.now().waits.split(" and ")  # threads that other tests have left in this process
    saver.start(1, lambda _: Never(), rest)
    try:
        assert begun.wait(5)
        [seen] = [place for place in Stacks.now().waits.split(" and ") if place not in before]
    finally:
        event.set()
        saver.close()
    assert seen.startswith("checkpoint/saver.py:") and seen.endswith(" _finish")


def test_a_process_that_does_nothing_of_slime_says_so() -> None:
    look = "import threading; from slime.observe.stacks import Stacks; threading.Timer(60, print).start(); print(Stacks.now().waits)"
    asked = [sys.executable, "-c", look + "; import os, sys; sys.stdout.flush(); os._exit(0)"]
    assert subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip() == AT_REST


def test_tasks_of_an_event_loop_are_counted_by_the_frame_of_slime_that_they_wait_in() -> None:
    async def look() -> tuple[str, str]:
        idle = awaits()
        waiting = [asyncio.create_task(together([asyncio.sleep(60)])) for _ in range(3)]
        await asyncio.sleep(0.01)
        seen = awaits()
        for task in waiting:
            task.cancel()
        return idle, seen

    idle, seen = asyncio.run(look())
    assert idle == AT_REST
    assert seen.startswith("3 tasks in rollout/groups.py:") and seen.endswith(" together")
