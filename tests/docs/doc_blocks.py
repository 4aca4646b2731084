"""The code blocks of the documentation, and how they are run: by themselves, in real processes.

- Blocks with a title are files of that name. Python blocks without one are a program, in order; a
  `text` block right behind one of them is what the program prints there.
- Console blocks are terminals. What follows a line `$ command` is what the command prints; `…`
  stands for anything. The last command of a block may go on while the next block runs; at the end
  of the page it is given an Enter, and what is shown behind an empty line is what it prints then.
  Blocks in `sh` or `bash` are commands without the `$`.
- Of the commands, ours are run (`OURS`); those that set a machine up (`SETS_UP`) are not.
- A block is not run at all when it begins with the line `# not run by the tests: …`.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
READMES = [ROOT / "README.md", ROOT / "README.zh-CN.md"]

LANGUAGES = {"", "python", "console", "sh", "bash", "text", "json", "yaml", "toml", "ini"}
TERMINALS = {"console", "sh", "bash"}
OURS = {"python", "llm-datadist", "pytest"}
SETS_UP = {"pip", "make", "git", "sudo", "docker", "kubectl", "openssl", "chmod"}
NOT_RUN = "# not run by the tests: "

_FENCE = re.compile(r"^( *)```(\w*)([^\n`]*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
_PAGE_S = 180.0


@dataclass(frozen=True)
class Block:
    language: str
    title: str
    text: str
    #: nothing but blank lines between the block before and this one
    follows: bool

    @property
    def is_run(self) -> bool:
        return not self.text.startswith(NOT_RUN)


@dataclass
class Command:
    """One command line of a terminal, and what it is to print."""

    line: str
    output: str = ""

    @property
    def outputs(self) -> tuple[str, str]:
        """What is printed before and after Enter."""
        before, _, after = self.output.partition("\n\n")
        return (before + "\n" if after else before), after


def blocks_of(page: Path) -> list[Block]:
    blocks, end, text = [], 0, page.read_text()
    for found in _FENCE.finditer(text):
        indent, language, info, body = found.groups()
        title = re.search(r'title="([^"]+)"', info)
        body = "".join(line.removeprefix(indent) for line in body.splitlines(keepends=True))
        follows = not text[end : found.start()].strip()
        blocks.append(Block(language, title[1] if title else "", body, follows))
        end = found.end()
    return blocks


def run_page(page: Path, directory: Path, places: Mapping[str, str]) -> None:
    """Runs all there is to run, in a directory; `places` are put in for what the page names."""
    blocks = [_with_places(block, places) for block in blocks_of(page)]
    for block in blocks:
        if block.title and block.language not in TERMINALS and block.is_run:
            (directory / block.title).write_text(block.text)
    program, output = _program_of(blocks)
    with ExitStack() as terminals:
        if program:
            (directory / "page.py").write_text(program)
            terminals.enter_context(_run(Command("python page.py", output), directory))
        for block in blocks:
            commands = _commands_of(block)
            for command in commands[:-1]:
                with _run(command, directory):
                    pass
            for command in commands[-1:]:
                terminals.enter_context(_run(command, directory))


def _with_places(block: Block, places: Mapping[str, str]) -> Block:
    text = block.text
    for name, place in places.items():
        text = text.replace(name, place)
    return replace(block, text=text)


def _program_of(blocks: list[Block]) -> tuple[str, str]:
    """The untitled Python blocks of a page, and all that they print; no output if none is shown."""
    program, output, is_shown = "", "", False
    for block in blocks:
        if block.language == "python" and not block.title and block.is_run:
            program += block.text
            is_shown = True
        else:
            if block.language == "text" and block.follows and is_shown:
                output += block.text
            is_shown = False
    return program, output


def _commands_of(block: Block) -> list[Command]:
    """The commands of ours in a terminal."""
    if block.language not in TERMINALS or not block.is_run:
        return []
    commands: list[Command] = []
    for line in block.text.replace("\\\n", " ").splitlines(keepends=True):
        if block.language != "console" or line.startswith("$ "):
            commands.append(Command(line.removeprefix("$ ").strip()))
        elif commands:
            commands[-1].output += line
    return [command for command in commands if _is_ours(command.line)]


def _is_ours(line: str) -> bool:
    words = (word for word in line.split() if not re.match(r"[A-Z_]+=", word))
    name = next(words, "#")
    known = name in OURS | SETS_UP or name.startswith("#")
    assert known, f"`{line}`: is it to be run? See OURS and SETS_UP"
    return name in OURS


@contextmanager
def _run(command: Command, directory: Path) -> Iterator[None]:
    """Goes on when the command has printed what it is to print; then gives it an Enter."""
    bin_directory = Path(sys.executable).parent
    process = subprocess.Popen(
        ["bash", "-c", f"exec env {command.line}"],
        cwd=directory,
        env={
            **os.environ,
            "PATH": f"{bin_directory}:{os.environ['PATH']}",
            "PYTHONUNBUFFERED": "1",
            "PYTHONWARNINGS": "error",
        },
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    watchdog = threading.Timer(_PAGE_S, process.kill)
    watchdog.start()
    try:
        before, after = command.outputs
        printed = _read(process, command.line, before)
        yield
        rest, _ = process.communicate("\n", timeout=_PAGE_S)
        assert process.returncode == 0, f"`{command.line}` failed:\n{printed}{rest}"
        if command.output:
            assert re.fullmatch(_pattern_of(after), rest), (
                f"`{command.line}` printed at the end\n{rest}instead of\n{after}"
            )
    finally:
        watchdog.cancel()
        process.kill()
        process.communicate()


def _read(process: subprocess.Popen[str], line: str, output: str) -> str:
    """What is printed until all that was expected has come; nothing is read where nothing is."""
    assert process.stdout is not None
    printed = ""
    while output and not re.fullmatch(_pattern_of(output), printed):
        more = process.stdout.readline()
        assert more, f"`{line}` printed\n{printed}instead of\n{output}"
        printed += more
    return printed


def _pattern_of(output: str) -> str:
    """A line that is nothing but `…` stands for any number of lines."""
    lines = [
        r"(?:.*\n)*" if line == "…\n" else re.escape(line).replace("…", ".*")
        for line in output.splitlines(keepends=True)
    ]
    return "".join(lines)
