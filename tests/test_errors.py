"""What people read is one line, ends as a sentence does, and cannot control a terminal."""

import pytest

from stillhouse.errors import NonFiniteError, RunError, StillhouseError, UserError


@pytest.mark.parametrize(
    ("message", "read"),
    [
        ("there is no x.", "there is no x."),
        ("valid names are 'a', 'b'", "valid names are 'a', 'b'."),
        ("did you mean 'a'?", "did you mean 'a'?"),
        ("did you mean 'a'?.", "did you mean 'a'?"),
        ("one\ntwo  three\n", "one two three."),
        ("a\x1b[31mred\0", "a\\x1b[31mred\\x00."),
        ("名前 is no name", "名前 is no name."),
    ],
)
def test_a_message_is_one_sentence(message, read):
    for kind in (StillhouseError, UserError, RunError):
        assert str(kind(message)) == read


def test_a_non_finite_error_keeps_what_it_knows():
    error = NonFiniteError("it is NaN", stage="s", term="t", step=3)
    assert (str(error), error.stage, error.term, error.step) == ("it is NaN.", "s", "t", 3)
