"""The inventory book: what is held, and which buckets changed."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from adapters.inventory import InventoryBook
from store.messages import BUCKETS, IndexEntry, InventoryMirror, Summary, hash_of

lines = st.integers(0, 40)
actions = st.lists(st.tuples(st.sampled_from(["hold", "let_go", "enter", "strike"]), lines))


def entry(n: int) -> IndexEntry:
    return IndexEntry("index", str(n), f"session/{n}")


class TestBook:
    """Kept up to date on every change."""

    @given(actions, st.integers(1, 5))
    def test_reader_has_what_the_book_has(self, todo: list[tuple[str, int]], every: int):
        """A mirror that is given changed buckets only holds exactly what the book holds."""
        book, mirror = InventoryBook(), InventoryMirror("p")
        held: set[str] = set()
        entries: set[IndexEntry] = set()
        for n, (action, number) in enumerate(todo):
            if action == "hold":
                book.hold(f"session/{number}")
                held.add(f"session/{number}")
            elif action == "let_go":
                book.let_go(f"session/{number}")
                held.discard(f"session/{number}")
            elif action == "enter":
                book.enter([entry(number)])
                entries.add(entry(number))
            else:
                book.strike([entry(number)])
                entries.discard(entry(number))
            if n % every == 0:
                mirror.update(Summary("p", n), book.root(), book.take())
        mirror.update(Summary("p", 0), book.root(), book.take())
        found = mirror.inventory()
        assert found is not None
        assert (found.held, set(found.entries)) == (held, entries)
        assert len(book) == len(held) + len(entries)
        book.put_back_all()
        whole = book.take()
        assert dict(mirror.digests) == {number: digest for number, (digest, _) in whole.items()}

    @given(actions)
    def test_digests_follow_from_the_content(self, todo: list[tuple[str, int]]):
        """Whichever way a content came about, its digests are the same; an empty book has none."""
        book = InventoryBook()
        for action, number in todo:
            if action in {"hold", "let_go"}:
                getattr(book, action)(f"session/{number}")
        held = {f"session/{n}" for _, n in todo} & set(_refs(book))
        fresh = InventoryBook()
        for ref in sorted(held):
            fresh.hold(ref)
        assert book.root() == fresh.root()
        assert _digests(book) == _digests(fresh)
        for ref in held:
            book.let_go(ref)
        assert book.root() == InventoryBook().root()
        assert _digests(book) == {}

    def test_only_changed_buckets(self):
        """What has not changed since the last time is not taken again."""
        book = InventoryBook()
        for n in range(1000):
            book.hold(f"session/{n}")
        assert len(book.take()) <= BUCKETS
        assert not book.dirty
        assert book.take() == {}
        book.hold("session/new")
        assert list(book.take()) == [str(hash_of("session/new") % BUCKETS)]
        book.hold("session/new")
        assert not book.dirty

    def test_put_back(self):
        """What did not arrive is taken again; a new process gets everything."""
        book = InventoryBook()
        book.hold("session/1")
        book.hold("session/2")
        taken = book.take()
        book.put_back(list(taken)[:1])
        assert list(book.take()) == list(taken)[:1]
        book.put_back_all()
        assert set(book.take()) == set(taken)


def _digests(book: InventoryBook) -> dict[str, str]:
    """The digest of each bucket that holds something."""
    book.put_back_all()
    return {number: digest for number, (digest, content) in book.take().items() if content}


def _refs(book: InventoryBook) -> list[str]:
    return [ref for bucket in book._held.values() for ref in bucket]
