"""Dead letters taken apart again."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tamiyo_svc.adapters.oona.dead_letters import bury
from tamiyo_svc.adapters.oona.entries import Entry
from tamiyo_svc.adapters.oona.letters import DeadLetter
from tamiyo_svc.taxonomy import DeadLetterReason

NAMES = st.binary(max_size=12).filter(lambda name: not name.startswith(b"dead."))


@given(
    st.dictionaries(NAMES, st.binary(max_size=20), max_size=4),
    st.sampled_from(DeadLetterReason),
    st.text(max_size=300),
    st.integers(1, 9),
)
def test_a_letter_holds_the_entry_it_was(
    fields: dict[bytes, bytes], reason: DeadLetterReason, detail: str, deliveries: int
) -> None:
    entry = Entry("oona.normal", "1-2", fields, deliveries)
    (output,) = bury(entry, reason, detail, "oona.dead").outputs
    letter = DeadLetter.of(Entry("oona.dead", "5-0", output.fields))
    assert letter.original == entry
    assert (letter.entry_id, letter.reason, letter.detail) == ("5-0", reason, detail[:200])


def test_fields_of_a_publisher_do_not_pass_for_ours() -> None:
    forged = {b"payload": b"p", b"dead.stream": b"oona.policy", b"dead.id": b"9-9"}
    (output,) = bury(
        Entry("oona.normal", "1-2", forged), DeadLetterReason.OVERSIZED, "", "oona.dead"
    ).outputs
    letter = DeadLetter.of(Entry("oona.dead", "5-0", output.fields))
    assert (letter.original.stream, letter.original.entry_id) == ("oona.normal", "1-2")
    assert letter.original.fields == {b"payload": b"p"}


@given(st.dictionaries(st.binary(max_size=16), st.binary(max_size=16), max_size=6))
def test_whatever_else_lies_there_is_a_letter_without_an_origin(fields: dict[bytes, bytes]) -> None:
    known = {b"dead.stream", b"dead.id"}
    rest = {name: value for name, value in fields.items() if name not in known}
    letter = DeadLetter.of(Entry("oona.dead", "5-0", rest))
    assert (letter.original.stream, letter.original.entry_id) == ("", "")
