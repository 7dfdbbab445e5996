"""hvdrun: tags, exit codes, and that nothing is left behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from horovod_cpp.run.output import LineTagger

HVDRUN = [sys.executable, "-m", "horovod_cpp.run"]
PRELUDE = """
import os, signal, sys, time
rank = int(os.environ["HOROVOD_RANK"])
"""


@pytest.fixture
def program(tmp_path: Path):
    """Makes a program that each rank runs; it knows `rank`."""

    def make(text: str) -> list[str]:
        path = tmp_path / "program.py"
        path.write_text(PRELUDE + textwrap.dedent(text))
        return [sys.executable, str(path)]

    return make


def hvdrun(*arguments: str, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*HVDRUN, *arguments], capture_output=True, text=True, timeout=60, **options)


def start(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*HVDRUN, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def wait_for_lines(process: subprocess.Popen[str], count: int) -> list[str]:
    assert process.stdout is not None
    return [process.stdout.readline() for _ in range(count)]


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


def assert_all_end(pids: list[int], within_seconds: float = 10) -> None:
    deadline = time.monotonic() + within_seconds
    for pid in pids:
        # Not our children: their state is all that can be asked for.
        while is_running(pid):
            assert time.monotonic() < deadline, f"process {pid} is still there"
            time.sleep(0.02)


def test_each_line_is_tagged_and_goes_where_it_came_from(program) -> None:
    run = hvdrun("-np", "3", *program("""
        for i in range(100):
            print(f"out {rank} {i}")
            print(f"err {rank} {i}", file=sys.stderr)
        sys.stdout.write("no newline")
    """))  # fmt: skip
    assert run.returncode == 0
    for name, text in (("out", run.stdout), ("err", run.stderr)):
        lines = text.splitlines()
        for rank in range(3):
            own = [line for line in lines if line.startswith(f"[{rank}] {name}")]
            assert own == [f"[{rank}] {name} {rank} {i}" for i in range(100)]
    assert sorted(line for line in run.stdout.splitlines() if "newline" in line) == [
        f"[{rank}] no newline" for rank in range(3)
    ]


def test_no_tag(program) -> None:
    # Untagged bytes pass as they come, and an unbuffered print writes its newline apart: one write a rank.
    run = hvdrun("-np", "2", "--no-tag", *program("os.write(1, b'plain\\n')"))
    assert run.stdout == "plain\nplain\n"


def test_variables_and_rendezvous_socket(program) -> None:
    given = ["--start-timeout", "7", "--log-level", "DEBUG", "--timeline-filename", "t{rank}", "--timeline-mark-cycles"]
    run = hvdrun("-np", "2", *given, *program("""
        import socket
        names = ["RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE", "CROSS_RANK", "CROSS_SIZE", "RENDEZVOUS_ADDR",
                 "START_TIMEOUT", "LOG_LEVEL", "TIMELINE", "TIMELINE_MARK_CYCLES"]
        print(*[os.environ["HOROVOD_" + name] for name in names], len(os.environ["HOROVOD_JOB_TOKEN"]))
        address = ("127.0.0.1", int(os.environ["HOROVOD_RENDEZVOUS_PORT"]))
        if rank == 0:
            listening = socket.socket(fileno=int(os.environ["HOROVOD_RENDEZVOUS_FD"]))
            assert listening.getsockname() == address
            peer, _ = listening.accept()
            assert peer.recv(100) == os.environ["HOROVOD_JOB_TOKEN"].encode()
        else:
            assert "HOROVOD_RENDEZVOUS_FD" not in os.environ
            socket.create_connection(address).sendall(os.environ["HOROVOD_JOB_TOKEN"].encode())
    """))  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert sorted(run.stdout.splitlines()) == [
        "[0] 0 2 0 2 0 1 127.0.0.1 7 debug t{rank} 1 64",
        "[1] 1 2 1 2 0 1 127.0.0.1 7 debug t{rank} 1 64",
    ]


def test_tokens_differ_between_jobs(program) -> None:
    command = program("print(os.environ['HOROVOD_JOB_TOKEN'])")
    assert hvdrun("-np", "1", *command).stdout != hvdrun("-np", "1", *command).stdout


def test_nobody_listens_after_rank_0_is_gone(program) -> None:
    process = start("-np", "2", *program("""
        print(os.environ["HOROVOD_RENDEZVOUS_PORT"])
        if rank == 1:
            time.sleep(60)
    """))  # fmt: skip
    port = int(wait_for_lines(process, 2)[0].split()[1])
    deadline = time.monotonic() + 10
    while True:
        with socket.socket() as client:
            if client.connect_ex(("127.0.0.1", port)) != 0:
                break
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.terminate()
    process.wait(30)


@pytest.mark.parametrize(
    ("how", "code", "text"),
    [
        ("sys.exit(3)", 3, "exited with code 3"),
        ("raise ValueError('boom')", 1, "exited with code 1"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", 139, "ended by signal 11"),
        ("os.kill(os.getpid(), signal.SIGKILL)", 137, "ended by signal 9"),
    ],
)
def test_the_first_failure_ends_all_and_gives_the_exit_code(program, how: str, code: int, text: str) -> None:
    run = hvdrun("-np", "3", *program(f"""
        print(os.getpid(), flush=True)
        if rank == 1:
            {how}
        time.sleep(60)
    """))  # fmt: skip
    assert run.returncode == code
    assert f"hvdrun: rank 1 was the first to fail: it was {text}".replace("was exited", "exited") in run.stderr
    assert "ending the ranks that still run: 0, 2" in run.stderr
    if "boom" in how:
        assert "[1] ValueError: boom" in run.stderr
    assert_all_end([int(line.split()[1]) for line in run.stdout.splitlines()])


def test_a_rank_that_ignores_sigterm_is_killed_after_the_grace(program) -> None:
    started = time.monotonic()
    run = hvdrun("-np", "2", *program("""
        if rank == 1:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            print(os.getpid(), flush=True)
            time.sleep(60)
        sys.stdin.readline()  # rank 0 has our standard input
        sys.exit(5)
    """), input="go\n")  # fmt: skip
    assert run.returncode == 5
    assert time.monotonic() - started < 30
    assert_all_end([int(line.split()[1]) for line in run.stdout.splitlines()])


def test_what_a_rank_has_started_goes_with_it(program) -> None:
    run = hvdrun("-np", "2", *program("""
        import subprocess
        print(subprocess.Popen(["sleep", "60"]).pid, flush=True)
        sys.exit(rank)
    """))  # fmt: skip
    assert run.returncode == 1
    assert_all_end([int(line.split()[1]) for line in run.stdout.splitlines()])


def test_a_rank_that_ends_well_ends_nobody_else(program) -> None:
    run = hvdrun("-np", "2", *program("""
        if rank == 1:
            time.sleep(0.5)
            print("still here")
    """))  # fmt: skip
    assert run.returncode == 0
    assert run.stdout == "[1] still here\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_are_passed_on(program, number: signal.Signals) -> None:
    process = start("-np", "2", *program("""
        def stop(number, frame):
            print("got", number)
            sys.exit(0)
        signal.signal(signal.SIGINT, stop)
        signal.signal(signal.SIGTERM, stop)
        print(os.getpid())
        time.sleep(60)
    """))  # fmt: skip
    pids = [int(line.split()[1]) for line in wait_for_lines(process, 2)]
    process.send_signal(number)
    out, _ = process.communicate(timeout=30)
    assert sorted(out.splitlines()) == [f"[{rank}] got {int(number)}" for rank in range(2)]
    assert process.returncode == 128 + number
    assert_all_end(pids)


def test_a_second_signal_kills(program) -> None:
    process = start("-np", "2", *program("""
        signal.signal(signal.SIGINT, lambda *_: print("not yet"))
        print(os.getpid())
        while True:
            time.sleep(60)
    """))  # fmt: skip
    pids = [int(line.split()[1]) for line in wait_for_lines(process, 2)]
    process.send_signal(signal.SIGINT)
    assert sorted(wait_for_lines(process, 2)) == ["[0] not yet\n", "[1] not yet\n"]
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == 130
    assert_all_end(pids)


def test_killing_hvdrun_leaves_no_process(program) -> None:
    command = program("""
        import subprocess
        print(os.getpid(), subprocess.Popen(["sleep", "60"]).pid)
        time.sleep(60)
    """)
    # A shell between hvdrun and the program: the signal of PR_SET_PDEATHSIG reaches only the shell.
    process = start("-np", "2", "sh", "-c", " ".join(command) + "; true")
    pids = [int(pid) for line in wait_for_lines(process, 2) for pid in line.split()[1:]]
    process.kill()
    process.wait(30)
    assert_all_end(pids)
    assert len(pids) == 4


def test_output_files(program, tmp_path: Path) -> None:
    folder = tmp_path / "logs"
    run = hvdrun("-np", "2", "--output-filename", str(folder), *program("""
        print("out", rank)
        print("err", rank, file=sys.stderr)
    """))  # fmt: skip
    for rank in range(2):
        assert (folder / f"rank.{rank}" / "stdout").read_text() == f"out {rank}\n"
        assert (folder / f"rank.{rank}" / "stderr").read_text() == f"err {rank}\n"
        assert f"[{rank}] out {rank}\n" in run.stdout


def test_large_output_arrives_whole(program) -> None:
    run = hvdrun("-np", "2", *program("""
        sys.stdout.write("".join(f"{'x' * 997}{i:05}\\n" for i in range(3000)))
        sys.stdout.flush()
        os._exit(4)  # with the pipe still full
    """))  # fmt: skip
    assert run.returncode == 4
    first = [line for line in run.stdout.splitlines() if line.startswith(("[0]", "[1]"))]
    assert max(sum(line.startswith(f"[{rank}]") for line in first) for rank in range(2)) == 3000


def test_a_reader_that_goes_away_ends_the_job(program) -> None:
    process = start("-np", "2", *program("""
        print(os.getpid())
        while True:
            print("more")
    """))  # fmt: skip
    pids = [int(line.split()[1]) for line in wait_for_lines(process, 2) if "more" not in line]
    process.stdout.close()
    assert process.wait(30) == 128 + signal.SIGPIPE
    assert_all_end(pids)
    process.stderr.close()


def test_verbose_says_how_each_rank_ended(program) -> None:
    run = hvdrun("-np", "2", "--verbose", *program("pass"))
    for rank in range(2):
        assert f"hvdrun: rank {rank} is process " in run.stderr
        assert f"hvdrun: rank {rank} exited with code 0" in run.stderr


def test_bad_command_lines() -> None:
    for arguments in (["-np", "0", "true"], ["true"], ["-np", "2"], ["-np", "two", "true"]):
        assert hvdrun(*arguments).returncode == 2
    missing = hvdrun("-np", "2", "no-such-program")
    assert missing.returncode == 127
    assert "no-such-program" in missing.stderr
    assert hvdrun("--version").stdout.strip() == "0.1.0"


def test_options_of_the_program_are_its_own(program) -> None:
    run = hvdrun("-np", "1", *program("print(sys.argv[1:])"), "-np", "7", "--verbose", "-v")
    assert run.stdout == "[0] ['-np', '7', '--verbose', '-v']\n"


@pytest.mark.parametrize("piece", [1, 2, 3, 1000])
def test_line_tagger_is_the_same_for_any_pieces(piece: int) -> None:
    data = b"one\ntwo\r\n\n\rbar 1\rbar 2\r\nlast"
    tagger = LineTagger(b"# ")
    out = b"".join(tagger.feed(data[at : at + piece]) for at in range(0, len(data), piece)) + tagger.finish()
    assert out == b"# one\n# two\r\n# \n# \r# bar 1\r# bar 2\r\n# last\n"
    assert tagger.finish() == b""


def test_hvdrun_needs_neither_torch_nor_the_library() -> None:
    code = "import sys, horovod_cpp.run; sys.exit('torch' in sys.modules or 'horovod_cpp._core' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=os.environ, timeout=60).returncode == 0
