"""The command line's clusters: fit the pipeline to one, submit runs to it, and ask how they are."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cbtm.errors import ConfigError

if TYPE_CHECKING:
    from cbtm.kubeflow.api import Kubeflow
    from cbtm.kubeflow.run_status import PodStatus

cluster_app = typer.Typer()

RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="Id of the run, as cbtm submit prints it.")]
HostOption = Annotated[
    str | None,
    typer.Option(help="Address of Kubeflow Pipelines; default KF_PIPELINES_ENDPOINT, else the kubeconfig's cluster."),
]
NamespaceOption = Annotated[str | None, typer.Option(help="Your namespace, where the installation has many users.")]
CertificateOption = Annotated[
    Path | None, typer.Option(help="File of the authority that signed the address's certificate.")
]
CpuImageOption = Annotated[str | None, typer.Option(help="Image of tasks without GPUs, in place of cbtm's own.")]
GpuImageOption = Annotated[str | None, typer.Option(help="Image of tasks with GPUs, in place of cbtm's own.")]
DigestsOption = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help='Pin the images: {"cpu": "name@sha256:…", "gpu": …}, or bake\'s metadata file.'),
]
ParallelismOption = Annotated[int | None, typer.Option(help="Tasks of a loop that run at once; 0 is all.")]
ShmOption = Annotated[str | None, typer.Option(help="Size of /dev/shm of pods with GPUs, such as 16Gi.")]
QueueOption = Annotated[str | None, typer.Option(help="Kueue's queue for all pods.")]


@cluster_app.command("compile")
def compile_pipeline(
    output: Annotated[Path, typer.Option(help="File to write.")] = Path("cbtm-pipeline.yaml"),
    comparison: Annotated[bool, typer.Option("--comparison", help="The pipeline of cbtm compare.")] = False,
    cpu_image: CpuImageOption = None,
    gpu_image: GpuImageOption = None,
    image_digests: DigestsOption = None,
    parallelism: ParallelismOption = None,
    shm_size: ShmOption = None,
    queue: QueueOption = None,
) -> None:
    """Write the pipeline for a cluster, to upload it or to submit it with --pipeline."""
    from cbtm.kubeflow.pipeline_file import images_of, shipped_pipeline

    shipped = shipped_pipeline("compare" if comparison else "cbtm")
    text = _fitted(shipped, cpu_image, gpu_image, image_digests, parallelism, shm_size, queue)
    output.write_text(text, encoding="utf-8")
    typer.echo(f"{output} cpu-image={images_of(text)['cpu']} gpu-image={images_of(text)['gpu']}")


@cluster_app.command()
def submit(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file of the run.")],
    override: Annotated[
        list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override one value; repeatable.")
    ] = None,
    host: HostOption = None,
    namespace: NamespaceOption = None,
    ca_cert: CertificateOption = None,
    experiment: Annotated[str, typer.Option(help="Experiment of Kubeflow Pipelines.")] = "cbtm",
    name: Annotated[str | None, typer.Option(help="Name of the run; default the configuration's.")] = None,
    service_account: Annotated[str | None, typer.Option(help="Service account of the pods.")] = None,
    params: Annotated[Path | None, typer.Option(metavar="FILE", help="YAML file of pipeline parameters.")] = None,
    param: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="One pipeline parameter; repeatable.")
    ] = None,
    pipeline: Annotated[Path | None, typer.Option(help="Compiled pipeline; default the one of this cbtm.")] = None,
    cpu_image: CpuImageOption = None,
    gpu_image: GpuImageOption = None,
    image_digests: DigestsOption = None,
    parallelism: ParallelismOption = None,
    shm_size: ShmOption = None,
    queue: QueueOption = None,
    wait: Annotated[bool, typer.Option("--wait", help="Show progress until the run ends.")] = False,
) -> None:
    """Submit a run to Kubeflow Pipelines; print its id and address."""
    from cbtm.kubeflow.api import Kubeflow
    from cbtm.kubeflow.parameters import parameter_types, read_parameters, with_configuration
    from cbtm.kubeflow.pipeline_file import shipped_pipeline
    from cbtm.run_config import load_config

    run = load_config(config, override)
    text = _fitted(
        _read(pipeline) or shipped_pipeline(), cpu_image, gpu_image, image_digests, parallelism, shm_size, queue
    )
    given = read_parameters(params, param or [], parameter_types(text))
    parameters = with_configuration(run, given)
    kubeflow = Kubeflow(host, namespace=namespace, ca_cert=ca_cert)
    made = kubeflow.submit(
        text, parameters, name=name or run.name, experiment=experiment, service_account=service_account
    )
    typer.echo(f"run={made.run_id}" + (f" url={made.url}" if made.url else ""))
    if wait:
        _follow(kubeflow, made.run_id)


@cluster_app.command()
def status(
    run: RunArgument,
    host: HostOption = None,
    namespace: NamespaceOption = None,
    ca_cert: CertificateOption = None,
    wait: Annotated[bool, typer.Option("--wait", help="Show progress until the run ends.")] = False,
) -> None:
    """Show how a run on a cluster is: its tasks, and what the failed ones say."""
    from cbtm.kubeflow.api import Kubeflow
    from cbtm.kubeflow.run_status import task_statuses

    kubeflow = Kubeflow(host, namespace=namespace, ca_cert=ca_cert)
    if wait:
        _follow(kubeflow, run)
    found = kubeflow.run(run)
    url = kubeflow.url(run)
    typer.echo(f"run={run} name={found.display_name} state={found.state}" + (f" url={url}" if url else ""))
    if found.error is not None and found.error.message:
        typer.echo(found.error.message)
    for task in task_statuses(found):
        typer.echo(str(task))
        for error in task.errors:
            typer.echo(f"  {error}")


@cluster_app.command()
def logs(
    run: RunArgument,
    cluster: Annotated[int | None, typer.Option(help="Cluster whose expert is trained.")] = None,
    member: Annotated[
        str | None, typer.Option(help="dense, cluster-00003, random-00003 …, in place of --cluster.")
    ] = None,
    task: Annotated[str | None, typer.Option(help="Name of a task, as cbtm status shows it.")] = None,
    host: HostOption = None,
    namespace: NamespaceOption = None,
    ca_cert: CertificateOption = None,
) -> None:
    """Show what a task of a run on a cluster wrote, or how to get it with kubectl."""
    from cbtm.kubeflow.api import Kubeflow
    from cbtm.kubeflow.run_status import member_pods, task_pods

    asked = [option for option in (cluster, member, task) if option is not None]
    if len(asked) != 1:
        raise ConfigError("give one of --cluster 3, --member dense and --task plan-run")
    kubeflow = Kubeflow(host, namespace=namespace, ca_cert=ca_cert)
    found = kubeflow.run(run)
    pods = task_pods(found, task) if task is not None else member_pods(found, _member(cluster, member))
    if not pods:
        every = _kubectl(namespace, f"get pods -l pipeline/runid={run}")
        typer.echo(f"no pod was started for it yet; all pods of the run: {every}")
        raise typer.Exit(1)
    for pod in pods:
        _show_log(kubeflow, run, pod, namespace)


@cluster_app.command()
def retry(
    run: RunArgument,
    host: HostOption = None,
    namespace: NamespaceOption = None,
    ca_cert: CertificateOption = None,
    wait: Annotated[bool, typer.Option("--wait", help="Show progress until the run ends.")] = False,
) -> None:
    """Do the failed tasks of a run on a cluster again; a training goes on from its checkpoint."""
    from cbtm.kubeflow.api import Kubeflow

    kubeflow = Kubeflow(host, namespace=namespace, ca_cert=ca_cert)
    found = kubeflow.run(run)
    if found.state not in ("FAILED", "CANCELED"):
        raise ConfigError(
            f"run {run} is {str(found.state).lower()}; only a run that failed or was cancelled is retried"
        )
    kubeflow.retry(run)
    typer.echo(f"run={run} is tried again")
    if wait:
        _follow(kubeflow, run)


def _fitted(
    text: str,
    cpu_image: str | None,
    gpu_image: str | None,
    digests: Path | None,
    parallelism: int | None,
    shm_size: str | None,
    queue: str | None,
) -> str:
    from cbtm.kubeflow.pipeline_file import CompileOptions, images_of, pinned_images, with_options

    fitted = with_options(text, CompileOptions(cpu_image, gpu_image, parallelism, shm_size, queue))
    if digests is None:
        return fitted
    pinned = pinned_images(digests, images_of(fitted))
    return with_options(fitted, CompileOptions(pinned["cpu"], pinned["gpu"]))


def _read(pipeline: Path | None) -> str | None:
    if pipeline is None:
        return None
    try:
        return pipeline.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--pipeline {pipeline} cannot be read: {error.strerror}; cbtm compile writes one") from None


def _follow(kubeflow: "Kubeflow", run: str) -> None:
    from cbtm.kubeflow.following import follow

    try:
        follow(kubeflow, run)
    except KeyboardInterrupt:
        typer.echo(f"the run goes on; cbtm status {run} --wait follows it again", err=True)
        sys.exit(130)
    typer.echo(f"run={run} succeeded")


def _member(cluster: int | None, member: str | None) -> Any:
    from cbtm.train.member import Member

    return Member("expert", cluster) if cluster is not None else Member.parse(str(member))


def _show_log(kubeflow: "Kubeflow", run: str, pod: "PodStatus", namespace: str | None) -> None:
    tried = f" attempt={pod.attempt}" if pod.attempt else ""
    typer.echo(f"task={pod.task} state={pod.state}{tried} node={pod.node}", err=True)
    for name in pod.pod_names:
        lines = kubeflow.log(run, name)
        if lines is not None:
            for line in lines:
                typer.echo(line)
            return
    ask = _kubectl(namespace, f"logs {pod.pod_names[0]} -c main")
    typer.echo(f"the server has no log of it; while the pod is there: {ask}", err=True)


def _kubectl(namespace: str | None, command: str) -> str:
    return f"kubectl {f'-n {namespace} ' if namespace else ''}{command}"
