"""Facts of SGLang's versions."""

import logging

import pytest

from slime.engine.versions import facts


@pytest.mark.parametrize(
    ("version", "session", "spans", "retracts"),
    [
        ("0.5.15", False, False, False),
        ("0.5.15.post1", False, False, False),
        ("0.5.18", False, False, False),
        ("0.5.19", False, True, False),
        ("0.5.20", False, True, False),
        ("0.5.21", True, True, True),
        ("0.5.23+cpu", True, True, True),
    ],
)
def test_known_versions(version: str, session: bool, spans: bool, retracts: bool, caplog: pytest.LogCaptureFixture) -> None:
    found = facts(version)
    assert (found.update_session, found.version_spans) == (session, spans)
    assert not caplog.records
    for pause in ("drain", "in_place"):
        found.check_pause(pause, version, "engine 0")
    if retracts:
        found.check_pause("retract", version, "engine 0")
    else:
        with pytest.raises(ValueError, match=rf"sync.pause=retract: engine 0 has SGLang {version}, which ends when it flushes"):
            found.check_pause("retract", version, "engine 0")


def test_a_newer_version_is_taken_to_be_like_the_newest_and_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert facts("0.6.0", "engine 3") == facts("0.5.23")
    assert "engine 3 has SGLang 0.6.0, newer than slime knows; it is used like 0.5.23" in caplog.text


@pytest.mark.parametrize("version", ["0.5.14", "0.4.99", "0.5.14.post3"])
def test_older_versions_are_refused(version: str) -> None:
    with pytest.raises(ValueError, match=rf"rollout.engine_python has SGLang {version}; slime needs 0.5.15 or newer"):
        facts(version)


def test_what_is_no_release_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'0.5.dev' *, which is not a release number"):
        facts("0.5.dev")
