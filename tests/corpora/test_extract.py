"""Taking the text of one kind out of a file."""

import ast

from cbtm.corpora.extract import (
    docstrings,
    header_code,
    html_text,
    notice_text,
    python_code,
    service_documentation,
    service_schema,
)


def test_html_becomes_one_block_a_line_and_entities_become_characters():
    html = "<p>Deletes a <code>Bucket</code> &amp; its\n   tags.</p><ul><li> one</li><li>two</li></ul>"
    assert html_text(html) == "Deletes a Bucket & its tags.\none\ntwo"
    assert html_text("plain  text\n") == "plain text"


MODEL = {
    "documentation": "<p>A service that stores boxes of any size for anyone.</p>",
    "operations": {
        "PutBox": {
            "documentation": "<p>Stores a box under a name of your choice.</p>",
            "input": {"shape": "PutBoxRequest"},
        },
        "Silent": {"input": {"shape": "PutBoxRequest"}},
    },
    "shapes": {
        "PutBoxRequest": {
            "type": "structure",
            "required": ["Name"],
            "members": {
                "Name": {"shape": "BoxName", "documentation": "<p>The name under which the box is stored.</p>"},
                "Token": {"shape": "Token", "documentation": "<p>Token.</p>"},
            },
        },
        "Colour": {
            "type": "string",
            "enum": ["RED", "BLUE"],
            "documentation": "<p>The colours that a box can have here.</p>",
        },
        "Again": {
            "type": "structure",
            "members": {"Name": {"shape": "BoxName", "documentation": "The name under which the box is stored."}},
        },
        "BoxName": {"type": "string"},
    },
}


def test_service_documentation_has_operations_with_their_inputs_and_repeats_no_sentence():
    assert list(service_documentation(MODEL)) == [
        "A service that stores boxes of any size for anyone.",
        "PutBox\nStores a box under a name of your choice.\n\nName: The name under which the box is stored.",
        "Colour. The colours that a box can have here.",
    ]


def test_service_schema_has_structures_and_enumerations_without_prose():
    assert service_schema(MODEL) == (
        '"PutBoxRequest": {\n "type": "structure",\n "required": ["Name"],\n "members": {\n'
        '  "Name": {"shape": "BoxName"},\n  "Token": {"shape": "Token"}\n }\n}\n\n'
        '"Colour": {\n "type": "string",\n "enum": ["RED", "BLUE"]\n}\n\n'
        '"Again": {\n "type": "structure",\n "members": {\n  "Name": {"shape": "BoxName"}\n }\n}'
    )


LONG = " ".join(f"word{i}" for i in range(40))


def test_docstrings_of_functions_methods_and_calls_that_attach_them():
    code = f'''
def short():
    """Says little."""

class A:
    """{LONG} class."""
    if True:
        def method(self):
            """{LONG} method."""

add_docstr(torch.abs, r"""
{{input}}
{LONG} attached.
""".format(**args))
'''
    assert [text.split()[-1] for text in docstrings(code)] == ["class.", "method.", "attached."]
    assert "{input}" not in docstrings(code)[2]
    assert docstrings("not python (") == []


def test_python_code_has_no_docstrings_and_comments_but_keeps_strings():
    code = '''"""Module."""
# a comment
import os  # why

class Empty(Exception):
    """Only words."""

def f(x):  # noqa
    """Do."""

    # next
    url = "http://x#y"
    text = """a # b
    """
    return x

NAME = 1
"""What NAME is."""
'''
    stripped = python_code(code)
    assert stripped.split("\n") == [
        *["", "", "import os", "", "class Empty(Exception):", "    pass", "", "def f(x):", '    url = "http://x#y"'],
        *['    text = """a # b', '    """', "    return x", "", "NAME = 1", "", ""],
    ]
    ast.parse(stripped)


def test_code_that_does_not_parse_gives_nothing():
    assert python_code("print 'python 2'") == ""


def test_only_a_licence_comment_at_the_start_of_a_header_is_removed():
    licence = "// Copyright 2020 Somebody\n// All rights reserved.\n"
    assert header_code(licence + "\n#pragma once\n// why\nint x;").strip() == "#pragma once\n// why\nint x;"
    assert header_code("/* Licensed under\n * terms */\n#pragma once\n").strip() == "#pragma once"
    explained = "// Explains the file.\n#pragma once\n"
    assert header_code(explained) == explained
    assert header_code(licence + "\n" + explained).strip() == explained.strip()


def test_notices_lose_badges_and_html_and_links_keep_their_words():
    readme = (
        "[![Build](https://ci/badge.svg)](https://ci)\n<img src='x'>\n.. image:: https://x\n   :target: https://y\n"
        "- [a list entry](https://x)\nRead [the manual](https://m) or `the site <https://s>`__ first.\n"
    )
    assert notice_text(readme) == "Read the manual or the site first.\n"
