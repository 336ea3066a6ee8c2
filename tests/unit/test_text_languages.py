from __future__ import annotations

import pytest

from quasr.errors import UnknownLanguageError
from quasr.text.languages import LANGUAGES, code, resolve, separator


@pytest.mark.parametrize(
    ("typed", "name"),
    [
        ("english", "English"),
        ("EN", "English"),
        (" English ", "English"),
        ("en-US", "English"),
        ("en_GB", "English"),
        ("eng", "English"),
        ("zh-Hans-CN", "Chinese"),
        ("Mandarin", "Chinese"),
        ("cmn", "Chinese"),
        ("zh-yue", "Cantonese"),
        ("YUE", "Cantonese"),
        ("tagalog", "Filipino"),
        ("tl", "Filipino"),
        ("Farsi", "Persian"),
        ("ger", "German"),
        ("deu", "German"),
        ("bahasa-indonesia", "Indonesian"),
    ],
)
def test_a_language_is_found_by_what_people_type(typed: str, name: str) -> None:
    assert resolve(typed) == name


def test_all_thirty_resolve_by_code_and_name_and_back() -> None:
    assert len(LANGUAGES) == 30
    for iso, name in LANGUAGES.items():
        assert resolve(iso) == resolve(name) == resolve(name.upper()) == name
        assert code(name) == code(name.lower()) == iso


@pytest.mark.parametrize(
    ("typed", "hint"),
    [("Englsh", "English"), ("portugese", "Portuguese"), ("Japanes", "Japanese"), ("mandarim", "Chinese")],
)
def test_a_misspelling_is_answered_with_the_close_ones(typed: str, hint: str) -> None:
    with pytest.raises(UnknownLanguageError, match=f"did you mean .*{hint}"):
        resolve(typed)


@pytest.mark.parametrize("typed", ["xx", "", "qqqqqq", "it is", "two\nlines", "z" * 10_000])
def test_anything_else_is_answered_with_one_line_that_lists_the_codes(typed: str) -> None:
    with pytest.raises(UnknownLanguageError) as caught:
        resolve(typed)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 400
    assert all(iso in message for iso in LANGUAGES)


def test_the_checkpoints_own_list_decides() -> None:
    known = ["English", "Klingon"]
    assert resolve("en", known) == "English"
    assert resolve("klingon", known) == "Klingon"
    with pytest.raises(UnknownLanguageError, match="does not know German: it knows English, Klingon"):
        resolve("de", known)
    with pytest.raises(UnknownLanguageError, match="did you mean Klingon"):
        resolve("Klingo", known)
    with pytest.raises(UnknownLanguageError, match="use one of English, Klingon"):
        resolve("xx", known)


def test_code_refuses_an_unknown_name() -> None:
    with pytest.raises(UnknownLanguageError, match="did you mean English"):
        code("Englisch")


def test_only_scripts_without_spaces_join_without_one() -> None:
    glued = {name for name in LANGUAGES.values() if separator(name) == ""}
    assert glued == {"Chinese", "Cantonese", "Japanese", "Thai"}
    assert separator("English") == separator("") == " "
