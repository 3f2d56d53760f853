"""The policy: what may be said, and what is refused because it cannot be meant."""

from __future__ import annotations

from pathlib import Path

import pytest

from reconciler import Policy
from reconciler.fold import ProcessState, Resource
from store import PolicyError


def everything_goes(resource: Resource, process: ProcessState, now_ms: int) -> str | None:
    """A rule, to be found by its import string."""
    return "everything goes"


class TestSeconds:
    """Times: more than 0, or off."""

    @pytest.mark.parametrize("value", [0, "0", -1, "nan", "inf", "soon", "", [1]])
    def test_refused(self, value: object):
        """0 is refused, and so is everything else that is not a time; the message names the setting."""
        with pytest.raises(PolicyError, match=r"session_idle_timeout: .*off"):
            Policy.read({"session_idle_timeout": value}, "test")

    @pytest.mark.parametrize("value", ["off", "OFF", " off ", None])
    def test_off(self, value: object):
        """`off` is no limit."""
        policy = Policy.read({"session_idle_timeout": value}, "test")
        assert policy.session_idle_timeout is None
        assert policy.idle_ms("session") is None

    def test_session_retention(self):
        """Conversations are kept for 30 days unless it is said; a minute at least, so that hosts can say
        what is in use."""
        assert Policy().session_retention == 30 * 86400
        assert Policy.read({"session_retention": "off"}, "test").session_retention is None
        assert Policy.read({"session_retention": "60"}, "test").session_retention == 60
        with pytest.raises(PolicyError, match="session_retention: must be 60 seconds at least"):
            Policy.read({"session_retention": 59}, "test")
        written = Policy(session_retention="off").model_dump_json(exclude_unset=True)
        assert Policy.model_validate_json(written).session_retention is None

    def test_numbers(self):
        """Seconds may be written as number or text."""
        policy = Policy.read({"session_idle_timeout": "2.5", "runner_idle_timeout": 3}, "test")
        assert (policy.idle_ms("session"), policy.idle_ms("runner")) == (2500, 3000)

    def test_written_and_read_again(self):
        """A policy that is written as JSON and read again is the same, with what is off."""
        policy = Policy(session_idle_timeout="off", idle_timeouts={"x": "off", "y": 3})
        again = Policy.model_validate_json(policy.model_dump_json())
        assert again == policy


class TestLoad:
    """From a file and from single settings."""

    def test_settings_win_over_the_file(self, tmp_path: Path):
        """What is set by hand wins over the file; both over the defaults."""
        path = tmp_path / "policy.toml"
        path.write_text(
            'session_idle_timeout = 5\nrunner_idle_timeout = "off"\n[idle_timeouts]\na = 1\nb = 2\n'
        )
        policy = Policy.load(path, ["session_idle_timeout=7", "idle_timeouts.b=9"])
        assert policy.session_idle_timeout == 7
        assert policy.runner_idle_timeout is None
        assert policy.idle_timeouts == {"a": 1, "b": 9}
        assert policy.agent_idle_timeout == 600

    @pytest.mark.parametrize(
        ("settings", "says"),
        [
            (["max_runners=0"], "max_runners"),
            (["max_runners=many"], "max_runners"),
            (["untracked=eat"], "untracked"),
            (["teardown_timeout=0"], "teardown_timeout"),
            (["sesion_idle_timeout=5"], "no such setting; there are session_idle_timeout"),
            (["session_idle_timeout"], "write name=value"),
            (["idle_timeouts.a=0"], "idle_timeouts.a"),
            (["idle_timeouts=5", "idle_timeouts.a=5"], "idle_timeouts"),
        ],
    )
    def test_cannot_be_meant(self, settings: list[str], says: str):
        """A name or value that cannot be meant is refused in one line that names it."""
        with pytest.raises(PolicyError) as caught:
            Policy.load(None, settings)
        assert says in str(caught.value)
        assert "\n" not in str(caught.value)

    def test_unreadable_file(self, tmp_path: Path):
        """A file that is not there, or is not TOML, is named."""
        with pytest.raises(PolicyError, match=r"none\.toml: cannot be read"):
            Policy.load(tmp_path / "none.toml")
        (tmp_path / "bad.toml").write_text("= 5")
        with pytest.raises(PolicyError, match=r"bad\.toml: is not TOML"):
            Policy.load(tmp_path / "bad.toml")

    def test_rule_by_import_string(self):
        """A rule of one's own is named by where it can be imported."""
        policy = Policy(rules=("tests.reconciler.test_policy.everything_goes",))
        assert policy.rules[0](None, None, 0) == "everything goes"

    def test_rule_that_is_not_there(self):
        """A rule that cannot be imported is an error of the policy."""
        with pytest.raises(PolicyError, match="rules"):
            Policy.read({"rules": ["tests.reconciler.test_policy.nothing"]}, "test")
