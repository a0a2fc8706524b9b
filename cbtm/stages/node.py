"""What a pod of a TrainJob runs: `python -m cbtm.stages.node TASK` is one machine of a training.

It brings the task's inputs to its disk as the stage on one machine does, and trains with its part of the ranks. The
first machine places the model below its root; the manifest is left to the stage that has launched it all, which is
the only one to write it. The log is the stage's way to metrics, and people's to what happens.
"""

import logging
import signal
import sys
from collections.abc import Mapping

from cbtm import manifest as manifests
from cbtm.errors import CbtmError, Interrupted, ManifestError
from cbtm.manifest import Placed
from cbtm.process import stage_process
from cbtm.progress import progress
from cbtm.run import Run
from cbtm.stages.experts import job_of
from cbtm.train.exchange import Exchange, NodeFailure, NodeTask
from cbtm.train.launch import train_on
from cbtm.train.member import Member
from cbtm.train.node import Node
from cbtm.train.pod_logs import metrics_line
from cbtm.train.worker import LaunchFolder

logger = logging.getLogger(__name__)


def run_node(task_uri: str) -> None:
    """Train as one machine of several.

    Args:
        task_uri: Address of the task that the launching stage wrote.

    Raises:
        CbtmError: As a stage does; what happened is written down for the launching stage.
    """
    exchange = Exchange.of_task(task_uri)
    task = exchange.read_task()
    run, member = Run.parse(task.config), Member.parse(task.member)
    config = run.optimization(member)
    node = Node.of_environment(config.nodes, config.devices)
    exchange.clear_failure(node.number)
    work = manifests.work_folder(run.train_spec(member))
    folder = LaunchFolder.below(work.parent)
    folder.clear_outcome()
    try:
        _train(run, member, task, node, exchange)
    except BaseException as error:
        failure = NodeFailure.of(error, node, config.devices, folder)
        try:
            exchange.write_failure(failure)
        except CbtmError as second:
            logger.warning("why this machine ends could not be written down: %s", second)
        raise


def _train(run: Run, member: Member, task: NodeTask, node: Node, exchange: Exchange) -> None:
    spec = run.train_spec(member)
    if spec.key != task.key:
        raise ManifestError(
            f"node {node.number} would train something else than it was asked for: another version of cbtm is in its "
            "image (train.node.image), or the run's inputs have changed; run this again"
        )
    work = manifests.work_folder(spec)
    job = job_of(run, member, work)
    with progress(f"train:{member.name}", "steps") as shown:
        facts = train_on(
            job,
            n_processes=job.config.devices,
            report=_report,
            progress=lambda step, loss: shown.update(step, job.config.steps, loss=f"{loss:.3f}"),
            node=node,
        )
    if node.number == 0:
        # The model is there: a request to stop does not make it worth less.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        files = manifests.describe(work)
        manifests.place(spec, work, files, manifests.load_if_there(spec.manifest_uri))
        exchange.write_result(task.key, Placed(files, facts))
        logger.info("member=%s files=%d placed below %s", member.name, len(files), spec.root)


def _report(metrics: Mapping[str, float], step: int) -> None:
    logger.info("%s", metrics_line(metrics, step))


def _stop(*_: object) -> None:
    raise Interrupted("stopped before training began")


def main(arguments: list[str]) -> None:
    """Run as `TASK`; a stop request ends it at once but in training, which handles it by itself."""
    # The first process of a container is not ended by SIGTERM unless it says so.
    signal.signal(signal.SIGTERM, _stop)
    with stage_process():
        try:
            run_node(arguments[0])
        except CbtmError:
            raise
        except Exception:
            logger.exception("a defect of cbtm")
            sys.exit(1)


if __name__ == "__main__":
    main(sys.argv[1:])
