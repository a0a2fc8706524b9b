"""A member that is trained on several machines, as the stage sees it: launched, and cleared away once published."""

from cbtm import storage
from cbtm.kubernetes import connect
from cbtm.manifest import Placed
from cbtm.run import Run
from cbtm.train import trainjob
from cbtm.train.exchange import Exchange, NodeTask
from cbtm.train.member import Member
from cbtm.train.nodes import Launch, Report, retire, train_on_nodes


def exchange(run: Run, member: Member) -> Exchange:
    """The files that a member's machines and its stage share."""
    return Exchange(run.exchange_root(member))


def train(run: Run, member: Member, report: Report) -> Placed:
    """Have a member trained by a TrainJob; `train_on_nodes` says what may happen."""
    spec, config, shared = run.train_spec(member), run.optimization(member), exchange(run, member)
    api = connect(config.node.namespace)
    manifest = trainjob.manifest(
        config,
        trainjob.OwnPod.of(api.own_pod()),
        root=run.config.root,
        member=member.name,
        key=spec.key,
        run_key=run.key,
        task_uri=shared.task_uri,
    )
    launch = Launch(
        api=api,
        exchange=shared,
        task=NodeTask(config=run.config.model_dump_json(), member=member.name, key=spec.key),
        manifest=manifest,
        root=spec.root,
        n_ranks=config.nodes * config.devices,
        restarts=config.node.restarts,
    )
    return train_on_nodes(launch, report)


def end_earlier(run: Run, member: Member) -> None:
    """End a TrainJob that still trains a member, or has: nothing else may write where it writes.

    Asked of the store first, so that a run on one machine needs no cluster.
    """
    shared = exchange(run, member)
    if storage.is_s3(run.config.root) and storage.exists(shared.task_uri):
        api = connect(run.optimization(member).node.namespace)
        retire(api, shared, trainjob.job_name(run.config.root, member.name))
