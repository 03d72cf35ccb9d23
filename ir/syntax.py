"""Python's parser, one thread at a time.

CPython counts the depth of `ast.parse` once for all threads (python/cpython#106905): where two take turns
inside it, either may end in SystemError("AST constructor recursion depth mismatch").
"""

from __future__ import annotations

import ast
import os
import threading

PARSER = threading.RLock()
if hasattr(os, "register_at_fork"):  # a child forked while another thread parses would wait for ever
    os.register_at_fork(before=PARSER.acquire, after_in_parent=PARSER.release, after_in_child=PARSER.release)


def parse_expression(text: str) -> ast.expr:
    """The syntax tree of one expression. Raises what `ast.parse` raises."""
    with PARSER:
        return ast.parse(text, mode="eval").body
