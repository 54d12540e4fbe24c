"""The journal: kept answers return in order, and nothing that is damaged or of another search is believed."""

from __future__ import annotations

import math
from pathlib import Path

from ts_adapt.search.journal import Journal


def squares(journal: Journal, questions: list[float]) -> list[float]:
    """The questions that had to be computed."""
    computed: list[float] = []

    def answer(question: float) -> list[float]:
        computed.append(question)
        return [question**2, math.inf]

    for question in questions:
        assert journal.recall([question], lambda question=question: answer(question)) == [question**2, math.inf]
    return computed


def test_a_journal_opened_again_answers_what_it_was_asked_before(tmp_path: Path) -> None:
    path = tmp_path / "a" / "journal"
    assert squares(Journal(path, "k"), [0.1, 2.0, 1 / 3]) == [0.1, 2.0, 1 / 3]
    assert squares(Journal(path, "k"), [0.1, 2.0, 1 / 3, 4.0]) == [4.0]
    assert squares(Journal(path, "k"), [0.1, 5.0, 1 / 3]) == [5.0, 1 / 3]
    assert squares(Journal(path, "k"), [0.1, 5.0, 1 / 3, 4.0]) == [4.0]


def test_a_journal_of_another_search_or_a_damaged_one_is_begun_anew(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    assert squares(Journal(path, "k"), [1.0]) == squares(Journal(path, "other"), [1.0]) == [1.0]
    for content in (
        "{", "[]", '{"key": "k", "records": [1]}', '{"key": "k", "records": [[["x"], [1]]]}',
        '{"key": "k", "records": {}}', '{"records": []}', "null",
    ):  # fmt: skip
        path.write_text(content)
        assert squares(Journal(path, "k"), [1.0]) == [1.0]


def test_a_journal_that_ends_is_removed_and_one_without_a_path_keeps_nothing(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal", "k")
    squares(journal, [1.0])
    journal.remove()
    journal.remove()
    assert not list(tmp_path.iterdir())
    assert squares(Journal(), [1.0]) == squares(Journal(), [1.0]) == [1.0]


def test_no_digit_of_a_journal_changes_unseen(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    squares(Journal(path, "k"), [0.1, 2.0])
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert squares(Journal(path, "k"), [0.1, 2.0]) in ([0.1, 2.0], [2.0], [])
    for end in (-1, -9):
        path.write_bytes(whole[:end])
        assert squares(Journal(path, "k"), [0.1, 2.0]) == [2.0]
        assert squares(Journal(path, "k"), [0.1, 2.0, 3.0]) == [3.0]
