"""The child process that renders one rule template: a script of its own, so that it loads nothing but Jinja.

Reads {"text", "context", "max_bytes"} as JSON from stdin, writes {"text", "lines"} or {"error", "line", "hint"} to stdout.
Its limits on memory and processor time are set before Jinja sees the template.
"""

from __future__ import annotations

import json
import resource
import sys
import traceback

MEMORY_BYTES = 384 << 20
CPU_SECONDS = 1

# marks a newline of the template with its line: begin, number, end; the three characters never stand in a rule file
BEGIN, END = "\x1c", "\x1d"


def limit() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 1))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def environment():
    from jinja2 import StrictUndefined
    from jinja2.ext import Extension
    from jinja2.lexer import Token
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class MarkLines(Extension):
        """Ends every line of template text with the number of that line."""

        def filter_stream(self, stream):
            for token in stream:
                if token.type != "data":
                    yield token
                    continue
                line, out = token.lineno, []
                for piece in token.value.splitlines(keepends=True):
                    if piece.endswith("\n"):
                        out.append(f"{piece[:-1]}{BEGIN}{line}{END}\n")
                        line += 1
                    else:
                        out.append(piece)
                yield Token(token.lineno, "data", "".join(out))

    made = ImmutableSandboxedEnvironment(
        undefined=StrictUndefined, extensions=[MarkLines], trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    for name in ("lipsum", "cycler", "joiner"):
        made.globals.pop(name, None)
    return made


def unmark(text: str) -> tuple[str, list[int]]:
    """The text without marks, and the template line of each of its lines."""
    lines, found, known = [], [], 1
    for line in text.split("\n"):
        clean, last = "", None
        for index, piece in enumerate(line.split(BEGIN)):
            if index:
                number, _, piece = piece.partition(END)
                last = int(number)
            clean += piece
        known = last if last is not None else known
        lines.append(clean)
        found.append(known)
    return "\n".join(lines), found


def render(request: dict) -> dict:
    from jinja2 import TemplateError, TemplateSyntaxError
    from jinja2.exceptions import SecurityError, UndefinedError

    try:
        template = environment().from_string(request["text"])
        pieces, size = [], 0
        for piece in template.generate(request["context"]):
            size += len(piece)
            if size > 4 * request["max_bytes"]:
                return {"error": "the template renders to more than a rule file may hold", "line": 0, "hint": ""}
            pieces.append(piece)
        text, lines = unmark("".join(pieces))
        if len(text) > request["max_bytes"]:
            return {"error": f"the template renders to {len(text):,} characters", "line": 0, "hint": ""}
        return {"text": text, "lines": lines}
    except TemplateSyntaxError as error:
        return {"error": f"bad template: {error.message}", "line": error.lineno, "hint": ""}
    except UndefinedError as error:
        hint = "templates know: platform, gpus, and model where a model is given"
        return {"error": f"bad template: {error.message}", "line": line_of(error), "hint": hint}
    except SecurityError as error:
        return {"error": f"the template is refused: {error}", "line": line_of(error), "hint": "use plain values only"}
    except TemplateError as error:
        return {"error": f"bad template: {error}", "line": line_of(error), "hint": ""}
    except MemoryError:
        return {"error": f"the template takes more than {MEMORY_BYTES >> 20} MiB", "line": 0, "hint": "render less"}
    except RecursionError:
        return {"error": "the template is nested too deep", "line": 0, "hint": ""}
    except Exception as error:
        return {"error": f"bad template: {type(error).__name__}: {error}", "line": line_of(error), "hint": ""}


def line_of(error: BaseException) -> int:
    """The template line that raised; Jinja gives frames of templates their own lines."""
    found = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == "<template>"]
    return found[-1] if found else 0


def main() -> None:
    request = json.loads(sys.stdin.read())
    limit()
    try:
        answer = render(request)
    except MemoryError:
        answer = {"error": f"the template takes more than {MEMORY_BYTES >> 20} MiB", "line": 0, "hint": "render less"}
    sys.stdout.write(json.dumps(answer))


if __name__ == "__main__":
    main()
