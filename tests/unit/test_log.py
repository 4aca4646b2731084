"""The logger. Spec 3.4. What depends on the environment runs in a process of its own."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from llm_datadist.observe.log import get_logger

if TYPE_CHECKING:
    from collections.abc import Mapping


def output_of(program: str, environment: Mapping[str, str] | None = None) -> str:
    """What a program prints that begins with `program`, after it got the logger as `log`."""
    inherited = {k: v for k, v in os.environ.items() if k != "ASCEND_GLOBAL_LOG_LEVEL"}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**inherited, "PYTHONPATH": os.pathsep.join(sys.path), **(environment or {})},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stderr == ""
    return done.stdout


ALL_LEVELS = """
from llm_datadist.observe.log import get_logger
log = get_logger()
log.debug("m-debug"); log.info("m-info"); log.warning("m-warning"); log.error("m-error")
"""


@pytest.mark.shows("logger")
@pytest.mark.parametrize(
    ("variable", "printed"),
    [
        ("0", ["m-debug", "m-info", "m-warning", "m-error"]),
        ("1", ["m-info", "m-warning", "m-error"]),
        ("2", ["m-warning", "m-error"]),
        ("3", ["m-error"]),
        ("4", ["m-error"]),
        ("", ["m-error"]),
        ("debug", ["m-error"]),
    ],
)
def test_the_environment_sets_the_level(variable: str, printed: list[str]) -> None:
    output = output_of(ALL_LEVELS, {"ASCEND_GLOBAL_LOG_LEVEL": variable})
    assert re.findall(r"m-\w+", output) == printed


@pytest.mark.shows("logger")
def test_without_the_variable_errors_are_printed() -> None:
    assert re.findall(r"m-\w+", output_of(ALL_LEVELS)) == ["m-error"]


@pytest.mark.shows("logger")
def test_a_line_says_who_where_and_when() -> None:
    program = """
from llm_datadist.observe.log import get_logger
def complain(): get_logger().error("the message")
complain()
"""
    assert re.fullmatch(
        r"\[ERROR\] LLM_DATADIST\(\d+,MainProcess\):[-\d]+:[:\d]+\.\d{3} "
        r"\[<string>:3\]\d+ complain: the message\n",
        output_of(program),
    )


@pytest.mark.shows("logger")
def test_importing_the_module_sets_nothing_up() -> None:
    program = """
import logging, llm_datadist.observe.log
print(logging.getLogger("LLM_DATADIST").handlers)
"""
    assert output_of(program) == "[]\n"


@pytest.mark.shows("logger")
def test_the_level_is_read_once_at_first_use() -> None:
    program = """
import os
import llm_datadist
os.environ["ASCEND_GLOBAL_LOG_LEVEL"] = "1"
from llm_datadist.observe.log import get_logger
get_logger().info("m-first")
os.environ["ASCEND_GLOBAL_LOG_LEVEL"] = "0"
get_logger().debug("m-second")
"""
    assert re.findall(r"m-\w+", output_of(program, {"ASCEND_GLOBAL_LOG_LEVEL": "3"})) == ["m-first"]


@pytest.mark.shows("logger")
def test_the_top_of_a_thread_can_log() -> None:
    program = """
import threading
from llm_datadist.observe.log import get_logger
thread = threading.Thread(target=get_logger().error, args=("m-thread",))
thread.start(); thread.join()
"""
    assert re.findall(r"m-\w+", output_of(program)) == ["m-thread"]


@pytest.mark.shows("logger")
def test_the_library_logs_there() -> None:
    program = """
from llm_datadist import LLMDataDist, LLMRole, LLMClusterInfo
datadist = LLMDataDist(LLMRole.DECODER, 1)
datadist.init({"llm.EnableCacheManager": "1"})
info = LLMClusterInfo()
info.append_local_ip_info("127.0.0.1", 0)
datadist.link_clusters([info])
"""
    assert output_of(program).startswith("[ERROR] LLM_DATADIST(")


def test_getting_the_logger_again_prints_no_line_twice() -> None:
    program = """
from llm_datadist.observe.log import get_logger
get_logger(); get_logger().error("m-once")
"""
    assert output_of(program).count("m-once") == 1


def test_the_output_follows_a_replaced_stdout() -> None:
    program = """
import io, sys
from llm_datadist.observe.log import get_logger
get_logger()
real, sys.stdout = sys.stdout, io.StringIO()
get_logger().error("m-hidden")
captured, sys.stdout = sys.stdout.getvalue(), real
get_logger().error("m-seen")
assert "m-hidden" in captured
"""
    assert re.findall(r"m-\w+", output_of(program)) == ["m-seen"]


def test_words_that_the_terminal_cannot_show_are_shown_as_escapes() -> None:
    program = """
from llm_datadist.observe.log import get_logger
get_logger().error("m-peer says \\u65e5")
"""
    assert r"m-peer says \u65e5" in output_of(program, {"PYTHONIOENCODING": "latin-1"})


def test_a_program_that_logs_itself_gets_each_record_once() -> None:
    program = """
import logging, sys
from llm_datadist.observe.log import get_logger
get_logger()
logging.basicConfig(stream=sys.stdout, format="mine: %(message)s")
get_logger().error("m-once")
"""
    assert output_of(program) == "mine: m-once\n"


def test_a_level_that_the_program_set_before_stays() -> None:
    program = (
        "import logging; logging.getLogger('LLM_DATADIST').setLevel(logging.INFO)" + ALL_LEVELS
    )
    assert re.findall(r"m-\w+", output_of(program)) == ["m-info", "m-warning", "m-error"]


def test_records_reach_the_handlers_of_the_root_logger(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="LLM_DATADIST"):
        get_logger().info("for whoever listens")
    assert [record.message for record in caplog.records] == ["for whoever listens"]
