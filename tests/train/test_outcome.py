import signal
from pathlib import Path

import pytest

from cbtm.errors import CbtmError, DataError, Interrupted, StorageError
from cbtm.train.outcome import Outcome, RankError, WorkerFailedError


def described(error, rank, time):
    """What a rank writes of an error that it meets at a time."""
    try:
        raise error
    except type(error) as met:
        found = RankError.of(met, rank)
    return RankError(**(vars(found) | {"time": time}))


def outcome(*errors, exit_codes=None, stopping=False):
    codes = dict.fromkeys((error.rank for error in errors if not error.is_interruption), 1) | (exit_codes or {})
    return Outcome(4, list(errors), codes, stopping, log=lambda rank: Path(f"logs/{rank}")).error()


GONE = RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]")
STOPPED = Interrupted("stopped at step 7 of 20; the checkpoint is at c")


def test_nothing_went_wrong():
    assert outcome() is None


def test_error_of_the_rank_that_failed_first_is_the_one():
    found = outcome(described(ValueError("second"), 0, 2.0), described(KeyError("first"), 3, 1.0))
    assert isinstance(found, WorkerFailedError)
    assert str(found) == "rank 3 of 4 failed: KeyError: 'first'; its log: logs/3"
    assert found.exit_code == 1


def test_traceback_of_a_defect_is_logged(caplog):
    caplog.set_level("INFO", logger="cbtm.train.outcome")
    outcome(described(ValueError("odd"), 2, 1.0))
    assert caplog.messages[0].startswith("rank 2 of 4:\nTraceback")
    assert caplog.messages[0].endswith("ValueError: odd")


@pytest.mark.parametrize("error", [GONE, type("DistBackendError", (RuntimeError,), {})("ncclRemoteError")])
def test_broken_collective_does_not_hide_its_cause_though_it_came_earlier(error):
    found = outcome(described(error, 0, 1.0), described(DataError("a shard is torn"), 2, 2.0))
    assert isinstance(found, DataError)
    assert str(found) == "rank 2 of 4: a shard is torn"
    assert "Connection closed" in str(outcome(described(GONE, 1, 1.0)))  # alone, it is what there is to say


def test_storage_error_that_speaks_of_a_connection_is_a_cause():
    found = outcome(described(StorageError("s3://bucket: connection reset by peer"), 0, 2.0), described(GONE, 1, 1.0))
    assert isinstance(found, StorageError)


def test_error_that_all_ranks_meet_names_none():
    found = outcome(*(described(DataError("no tokens"), rank, 5.0 - rank) for rank in range(4)))
    assert str(found) == "no tokens"


def test_exit_code_is_that_of_an_error_class_of_its_own():
    class DivergedError(CbtmError):
        exit_code = 9

    found = outcome(described(DivergedError("the loss is nan at step 3"), 0, 1.0))
    assert (type(found), found.exit_code, str(found)) == (CbtmError, 9, "the loss is nan at step 3")


def test_killed_rank_is_the_cause_of_what_the_others_say():
    found = outcome(described(RuntimeError("odd"), 0, 1.0), exit_codes={0: 1, 2: -signal.SIGKILL, 1: -signal.SIGTERM})
    assert str(found) == ("rank 2 of 4 was ended by signal 9 (SIGKILL), most often for want of memory; its log: logs/2")
    assert "signal 11 (SIGSEGV); its log" in str(outcome(exit_codes={1: -signal.SIGSEGV}))


def test_abort_is_no_cause_where_another_rank_has_one():
    # NCCL aborts a process whose collective waited too long.
    codes = {0: -signal.SIGABRT}
    assert isinstance(outcome(described(DataError("torn"), 1, 1.0), exit_codes=codes), DataError)
    assert "signal 6 (SIGABRT)" in str(outcome(described(GONE, 1, 1.0), exit_codes=codes))


def test_exit_without_a_word():
    assert "rank 1 of 4 ended with code 3 and no message; its log" in str(outcome(exit_codes={1: 3}))


def test_interruption_is_one_message():
    found = outcome(*(described(STOPPED, rank, 1.0) for rank in range(4)), stopping=True)
    assert isinstance(found, Interrupted)
    assert str(found) == str(STOPPED)


def test_interruption_of_those_that_had_not_begun_or_lost_their_peers():
    # One rank ended by SIGTERM before it could save, and the other in a collective with it, or by itself.
    for errors in ([], [described(GONE, 1, 1.0)], [described(STOPPED, 1, 1.0)]):
        found = outcome(*errors, exit_codes={0: -signal.SIGTERM}, stopping=True)
        assert isinstance(found, Interrupted)
        assert "stopped without a new checkpoint; training goes on from the last one" in str(found)


def test_checkpoint_that_failed_is_no_interruption():
    found = outcome(described(STOPPED, 0, 1.0), described(StorageError("disk full"), 1, 2.0), stopping=True)
    assert isinstance(found, StorageError)
    found = outcome(described(STOPPED, 0, 1.0), exit_codes={1: -signal.SIGKILL}, stopping=True)
    assert isinstance(found, WorkerFailedError)
