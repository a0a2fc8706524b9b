"""Take the texts of one kind out of a file: pure functions from the content of a file to texts.

Each strips what belongs to another kind (prose from code, code from schemas), so that the kinds of the sample differ.
"""

import ast
import json
import re
from collections.abc import Iterator, Mapping
from html.parser import HTMLParser
from typing import Any

MIN_DOCSTRING_WORDS = 40
MIN_SENTENCE_CHARS = 30  # shorter documentation of a member ("The name.") says nothing of its service

_HTML_BLOCKS = frozenset(
    ("p", "li", "ul", "ol", "dl", "dt", "dd", "br", "pre", "div", "table", "tr", "h1", "h2", "h3", "h4")
) | {"note", "important", "caution", "warning", "fullname"}  # of the AWS service models
_HTML_MARK = re.compile(r"[<&]")
# One alternative keeps strings whole, so that a '#' inside one is not taken for a comment.
_STRING_OR_COMMENT = re.compile(
    r'("""(?:\\.|[^\\])*?"""'
    r"|'''(?:\\.|[^\\])*?'''"
    r'|"(?:\\.|[^"\\\n])*"'
    r"|'(?:\\.|[^'\\\n])*')"
    r"|(?<=\n)[ \t]*#[^\n]*\n|[ \t]*#[^\n]*",
    re.DOTALL,
)
_LEADING_COMMENT = re.compile(r"\s*(?:/\*.*?\*/|//[^\n]*(?:\n//[^\n]*)*)", re.DOTALL)
_LICENCE_WORDS = re.compile(r"(?i)licen[cs]e|copyright|all rights reserved")
_PLACEHOLDER_LINE = re.compile(r"^[ \t]*\{\w+\}[ \t]*\n", re.MULTILINE)
_MARKUP_LINE = re.compile(
    r"^\s*(?:\[?!\[|</?[a-zA-Z!]|\.\. (?:image|\|)|:(?:target|alt|width|height):|\.\. _|\[[^\]]*\]:\s*\S+$"
    r"|(?:[-*] )?\[[^\]]*\]\([^)]*\)$|(?:[-*] )?<?https?://\S+$|\|\w+\|)"
)
_LINK = re.compile(r"\[([^\]\n]*)\]\(\s*https?://[^)\s]*\)|`([^`<]+?)\s*<https?://[^>]*>`_{1,2}")


class _HtmlText(HTMLParser):
    """Collects the text of a fragment, with a line end at every border of a block."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in _HTML_BLOCKS:
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        if tag in _HTML_BLOCKS:
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        self.parts.append(re.sub(r"\s+", " ", data))


def html_text(fragment: str) -> str:
    """Return the text of an HTML fragment, one block a line."""
    if not _HTML_MARK.search(fragment):
        return " ".join(fragment.split())
    parser = _HtmlText()
    parser.feed(fragment)
    parser.close()
    lines = (line.strip() for line in "".join(parser.parts).split("\n"))
    return "\n".join(line for line in lines if line)


def service_documentation(model: Mapping[str, Any]) -> Iterator[str]:
    """Documentation of a botocore service model: one text for the service and each operation, one for the shapes.

    A sentence that the service repeats (page tokens, tags) is kept the first time only.
    """
    shapes = model.get("shapes", {})
    seen: set[str] = set()

    def first_time(documented: Mapping[str, Any]) -> str:
        text = html_text(documented.get("documentation", ""))
        if len(text) < MIN_SENTENCE_CHARS or text in seen:
            return ""
        seen.add(text)
        return text

    def members(shape: str) -> list[str]:
        described = {m: first_time(v) for m, v in shapes.get(shape, {}).get("members", {}).items()}
        return [f"{member}: {text}" for member, text in described.items() if text]

    yield first_time(model)
    for name, operation in model.get("operations", {}).items():
        if text := first_time(operation):
            inputs = members(operation.get("input", {}).get("shape", ""))
            yield "\n\n".join([f"{name}\n{text}", *inputs])
    blocks = []
    for name, shape in shapes.items():
        text, lines = first_time(shape), members(name)
        if text or lines:
            blocks.append("\n".join([f"{name}. {text}" if text else f"{name}.", *lines]))
    yield "\n\n".join(blocks)


def service_schema(model: Mapping[str, Any]) -> str:
    """Return the structures and enumerations of a botocore service model as JSON without prose, a member a line."""
    blocks = []
    for name, shape in model.get("shapes", {}).items():
        parts = [f' "{key}": {_compact(value)}' for key, value in shape.items() if key in ("type", "required", "enum")]
        members = [f'  "{m}": {_compact(v)}' for m, v in shape.get("members", {}).items()]
        if members:
            parts.append(' "members": {\n' + ",\n".join(members) + "\n }")
        if members or "enum" in shape:
            blocks.append(f'"{name}": {{\n' + ",\n".join(parts) + "\n}")
    return "\n\n".join(blocks)


def _compact(value: Any) -> str:
    if isinstance(value, dict):
        value = {k: v for k, v in value.items() if not k.startswith("documentation")}
    return json.dumps(value)


def docstrings(code: str) -> list[str]:
    """Docstrings of a module, its classes and functions, and the texts that torch and numpy attach by a call.

    Returns:
        Texts of at least 40 words in the order of the file; empty if the code does not parse.
    """
    found: list[str] = []
    for node in _statements(_parse(code)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) and _attaches_docstring(node.value):
            strings = [n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
            text = _PLACEHOLDER_LINE.sub("", max(strings, key=len, default=""))
        else:
            continue
        if text and len(text.split()) >= MIN_DOCSTRING_WORDS:
            found.append(text)
    return found


def _attaches_docstring(call: ast.Call) -> bool:
    name = getattr(call.func, "attr", getattr(call.func, "id", ""))
    return name in ("add_docstr", "add_newdoc", "_add_docstr")


def python_code(code: str) -> str:
    """Return Python code without docstrings, other strings that stand as statements, and comments.

    Returns:
        The code, with `pass` where a docstring was a whole body; empty if the input does not parse.
    """
    tree = _parse(code)
    lines = code.split("\n")
    for node in _statements(tree):
        body = getattr(node, "body", None)
        for child in body if isinstance(body, list) else []:
            if _is_string(child):
                first, last = child.lineno - 1, child.end_lineno
                stand_in = ["pass"] if len(body or []) == 1 and not isinstance(node, ast.Module) else [""]
                # Keep the number of lines, since later nodes are named by line.
                lines[first:last] = [" " * child.col_offset + stand_in[0]] + [""] * (last - first - 1)
    if not tree.body:
        return ""
    bare = _STRING_OR_COMMENT.sub(lambda match: match[1] or "", "\n" + "\n".join(lines))
    return re.sub(r"(:[^\S\n]*\n)(?:[^\S\n]*\n)+", r"\1", bare)


def _parse(code: str) -> ast.Module:
    try:
        return ast.parse(code)
    except (SyntaxError, ValueError, RecursionError):
        return ast.Module(body=[], type_ignores=[])


def _statements(node: ast.AST) -> Iterator[ast.AST]:
    """Yield a node and the statements below it, in order; expressions are not entered, for speed."""
    yield node
    for part in ("body", "handlers", "orelse", "finalbody", "cases"):
        children = getattr(node, part, None)
        if isinstance(children, list):
            for child in children:
                yield from _statements(child)


def _is_string(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def header_code(code: str) -> str:
    """Return a C or C++ header without the comments at its start that speak of a licence."""
    while (match := _LEADING_COMMENT.match(code)) and _LICENCE_WORDS.search(match[0]):
        code = code[match.end() :]
    return code


def notice_text(text: str) -> str:
    """Return a licence or readme without HTML, badges, images and lists of links; other links keep their words."""
    lines = (line for line in text.split("\n") if not _MARKUP_LINE.match(line))
    return _LINK.sub(lambda match: match[1] or match[2] or "", "\n".join(lines))
