"""The language of prompts: what the web UI's documentation says each prompt means."""

from __future__ import annotations

import pytest

from ldm.errors import ConfigError
from ldm.prompts import Token, parse_weights, split_chunks

UP, DOWN = 1.1, 1 / 1.1


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("", []),
        ("a red flower, 4k: best", [("a red flower, 4k: best", 1)]),
        ("붉은 꽃 🌹 e\u0301", [("붉은 꽃 🌹 e\u0301", 1)]),
        # brackets
        ("a (red) flower", [("a ", 1), ("red", UP), (" flower", 1)]),
        ("((red))", [("red", UP**2)]),
        ("[red]", [("red", DOWN)]),
        ("[[red]]", [("red", DOWN**2)]),
        ("([red])", [("red", 1)]),
        ("(붉은) 꽃", [("붉은", UP), (" 꽃", 1)]),
        ("()[]", []),
        ("(a)(b)", [("ab", UP)]),
        ("(a) (b)", [("a", UP), (" ", 1), ("b", UP)]),
        # numbers
        ("(red:1.3)", [("red", 1.3)]),
        ("(red:.5)", [("red", 0.5)]),
        ("(red:2.)", [("red", 2)]),
        ("(red:+2)", [("red", 2)]),
        ("(red:-1)", [("red", -1)]),
        ("(red:0)", [("red", 0)]),
        ("(red : 1.3 )", [("red ", 1.3)]),
        ("(red:rose:1.3)", [("red:rose", 1.3)]),
        ("(red:1.2.3)", [("red:1.2.3", UP)]),
        ("(red:x)", [("red:x", UP)]),
        ("(red:)", [("red:", UP)]),
        ("(:1.3)", []),
        ("[red:x]", [("red:x", DOWN)]),
        ("at 10:30", [("at 10:30", 1)]),
        # nesting
        ("(a (b:2) c:1.5)", [("a ", 1.5), ("b", 3), (" c", 1.5)]),
        ("(a [b] c)", [("a ", UP), ("b", DOWN * UP), (" c", UP)]),
        ("((a:1.5) b)", [("a", 1.5 * UP), (" b", UP)]),
        (
            "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",
            [
                ("a ", 1), ("house", 1.3 * UP**2), (" ", UP), ("on", 1), (" a ", UP),
                ("hill", 0.5 * UP), (", sun, ", UP), ("sky", UP**4), (".", UP),
            ],
        ),
        # escapes
        (r"\(red\)", [("(red)", 1)]),
        (r"\[a|b\] \[a:b:0.5\]", [("[a|b] [a:b:0.5]", 1)]),
        (r"a\\b \(", [(r"a\b (", 1)]),
        (r"(vase \(old\):1.2)", [("vase (old)", 1.2)]),
        (r"[a\|b]", [("a|b", DOWN)]),
        (r"(\\)", [("\\", UP)]),
        (r"\m/ \ end\\", [("m/  end\\", 1)]),
        # unbalanced: what is never closed weighs the rest, what was never opened is text
        ("(red", [("red", UP)]),
        ("a ((red flower", [("a ", 1), ("red flower", UP**2)]),
        ("a [red flower", [("a ", 1), ("red flower", DOWN)]),
        ("(a [b", [("a ", UP), ("b", UP * DOWN)]),
        ("red) flower", [("red) flower", 1)]),
        ("red] flower", [("red] flower", 1)]),
        ("red:1.3) flower", [("red:1.3) flower", 1)]),
        ("(a))", [("a", UP), (")", 1)]),
        ("(a:1.3", [("a:1.3", UP)]),
        ("(a]", [("a]", UP)]),
        ("[a:1.3)", [("a:1.3)", DOWN)]),
        # words that the web UI reads and ldm does not
        ("a cat AND a dog", [("a cat AND a dog", 1)]),
        ("a|b", [("a|b", 1)]),
        ("[a|b", [("a|b", DOWN)]),
    ],
)  # fmt: skip
def test_weights(prompt: str, expected: list) -> None:
    sections = parse_weights(prompt)
    assert [text for text, _ in sections[0]] == [text for text, _ in expected]
    assert [weight for _, weight in sections[0]] == pytest.approx([w for _, w in expected])
    assert len(sections) == 1


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a BREAK b", [[("a ", 1)], [(" b", 1)]]),
        ("a\nBREAK\nb", [[("a\n", 1)], [("\nb", 1)]]),
        ("BREAK b", [[], [(" b", 1)]]),
        ("a BREAKBREAK", [[("a BREAKBREAK", 1)]]),
        ("a,BREAK", [[("a,", 1)], []]),
        ("(a BREAK b:2)", [[("a ", 2)], [(" b", 2)]]),
        ("(a)BREAK[b]", [[("a", UP)], [("b", DOWN)]]),
        ("a break, BREAKING BREAKs", [[("a break, BREAKING BREAKs", 1)]]),
    ],
)
def test_break_parts_sections(prompt: str, expected: list) -> None:
    assert parse_weights(prompt) == expected


@pytest.mark.parametrize(
    ("prompt", "named"),
    [
        ("a [cat:dog:0.5] here", "[cat:dog:0.5]"),
        ("a [cat::10]", "[cat::10]"),
        ("a [cat:0.5]", "[cat:0.5]"),
        ("a [cat : 5 ]", "[cat : 5 ]"),
        ("[a (big:1.2) cat:dog:3]", "[a (big:1.2) cat:dog:3]"),
        ("a [cat|dog] here", "[cat|dog]"),
        ("[fe|]male", "[fe|]"),
        ("red <lora:petals:0.8>", "<lora:petals:0.8>"),
        ("<hypernet:x:1>", "<hypernet:x:1>"),
    ],
)
def test_what_ldm_has_not_is_refused(prompt: str, named: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_weights(prompt)
    assert named in str(caught.value) and "\n" not in str(caught.value)


def test_the_refusals_advice_works() -> None:
    with pytest.raises(ConfigError, match=r"write \\\[ and \\\] for"):
        parse_weights("[cat|dog]")
    assert parse_weights(r"\[cat|dog\]") == [[("[cat|dog]", 1)]]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("", [""]),
        ("a b c d", ["a b c d"]),
        ("a b c d e", ["a b c d e"]),
        ("a b c d e f", ["a b c d e", "f"]),
        # a clause moves whole
        ("a b , d e f", ["a b ,", "d e f"]),
        ("a b c d , f", ["a b c d ,", "f"]),
        ("a , b , c d e", ["a , b ,", "c d e"]),
        # unless its comma is further away than `backtrack`
        ("a , c d e f", ["a , c d e", "f"]),
        # a comma that does not fit moves nothing
        ("a b , d e , g", ["a b , d e", ", g"]),
        # an embedding of three vectors moves whole
        ("a b c <x> d", ["a b c", "<x> d"]),
        ("a b , d <x> e", ["a b ,", "d <x> e"]),
        ("<x> , e <x> <x>", ["<x> ,", "e <x>", "<x>"]),
    ],
)
def test_chunks_of_five(words: str, expected: list[str]) -> None:
    tokens = [Token([1, 2, 3] if w == "<x>" else [0], w + " ", 1.0) for w in words.split()]
    chunks = split_chunks(tokens, room=5, backtrack=3)
    assert [" ".join(token.text.strip() for token in chunk) for chunk in chunks] == expected


def test_the_web_uis_chunks() -> None:
    """75 tokens, and a clause of up to 19 after the comma of it is kept whole."""
    for after, expected in ((19, [56, 20]), (20, [75, 1])):
        words = ["a"] * (74 - after) + [","] + ["b"] * (after + 1)
        chunks = split_chunks([Token([0], word, 1.0) for word in words], room=75)
        assert [len(chunk) for chunk in chunks] == expected
