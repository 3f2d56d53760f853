"""Keys: one hash tag per partition."""

from __future__ import annotations

import re

import pytest

from store import NamespaceError
from store.keys import Keys, PartitionKeys, partition_of


def tag(key: str) -> str:
    found = re.match(r"[^{]*\{([^}]+)\}", key)
    assert found
    return found.group(1)


def names(keys: object) -> list[str]:
    return [n for n, v in vars(type(keys)).items() if isinstance(v, property)]


class TestHashTags:
    """What a script touches is in one slot."""

    def test_partition(self):
        """Every key of a partition carries the tag {namespace/partition}, and no two are the same."""
        keys = Keys("ns").partition(3)
        made = [getattr(keys, name) for name in names(keys)]
        made += [keys.inventory("p"), keys.orders("p"), keys.reply("r")]
        assert {tag(key) for key in made} == {"ns/3"}
        assert len(set(made)) == len(made) >= 10

    def test_braces_in_a_process_name_do_not_matter(self):
        """Redis takes the first braces only: a process named with braces stays in its slot."""
        assert tag(Keys("ns").partition(0).inventory("{x}")) == "ns/0"

    def test_namespace(self):
        """Keys of the namespace as a whole carry its name."""
        keys = Keys("ns")
        assert {tag(getattr(keys, name)) for name in names(keys)} == {"ns"}

    def test_namespaces_do_not_share_keys(self):
        """Two namespaces have no key in common."""
        assert PartitionKeys("a", 1).log != PartitionKeys("b", 1).log


class TestNames:
    """What a namespace may be called."""

    @pytest.mark.parametrize("name", ["a", "prod-1.eu_west", "x" * 64])
    def test_good(self, name: str):
        """Letters, digits, underscore, dot and dash, up to 64."""
        assert Keys(name).namespace == name

    @pytest.mark.parametrize("name", ["", "a b", "a/b", "{a}", "a:b", "ä", "x" * 65, "a\n"])
    def test_bad(self, name: str):
        """Anything else is refused, with what is allowed."""
        with pytest.raises(NamespaceError, match=r"cannot be used: give 1 to 64"):
            Keys(name)


class TestPartitionOf:
    """Which partition holds the events of a process."""

    def test_stable(self):
        """It is CRC-32 modulo the count: the same in every release and language."""
        assert partition_of("123456789", 2**32) == 0xCBF43926
        assert partition_of("svc@h:1:2", 16) == partition_of("svc@h:1:2", 16)

    def test_spread(self):
        """Processes spread over all partitions."""
        assert {partition_of(f"svc@h:{n}:0", 16) for n in range(500)} == set(range(16))
