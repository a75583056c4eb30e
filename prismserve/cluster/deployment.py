"""Cluster files from the settings ``serve --config`` takes: ``ray up`` for GPU machines, KubeRay for Kubernetes.

``python -m prismserve.cluster.deployment deploy/cluster.yaml --out deploy`` writes ``ray-cluster.yaml`` and
``kuberay-rayservice.yaml``. What settings do not know, such as machine types, is in :class:`Target`.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import yaml
from pydantic import Field

import prismserve
from prismserve.cluster.kuberay import APPLICATION, GPU, Pod, http_probe, labels
from prismserve.cluster.settings import Settings, load_settings, read_config
from prismserve.core.config import FrozenConfig, PositiveInt
from prismserve.core.errors import ConfigurationError

RAY_VERSION: Final = "2.60.0"
IMPORT_PATH: Final = "prismserve.cluster.app:build"
ROUTER_RESOURCE: Final = "prismserve_router"
READINESS_PATH: Final = "/-/healthz"
_STOP_MARGIN_S: Final = 30
_AGENT_PORT: Final = 52365
_DASHBOARD_PORT: Final = 8265
_OBJECT_STORE_BYTES: Final = 100 * 1024 * 1024
_GIB: Final = 1 << 30


class Target(FrozenConfig):
    """Where a cluster is deployed: what the settings of a cluster do not know.

    Attributes:
        image: container image with this package (see ``deploy/Dockerfile``).
        gpus_per_node: GPUs of one worker machine.
        cpus_per_node: CPU cores of one worker machine left to workers.
        memory_per_node_gib: memory of one worker machine left to workers, in GiB.
        router_cpus: CPU cores of one router pod, and of the head.
        router_memory_gib: memory of one router pod, and of the head, in GiB.
        region: of the cloud provider (``ray up``).
        head_machine: machine type of the head (``ray up``).
        worker_machine: machine type of a GPU worker (``ray up``).
        disk_gib: root disk of every machine, in GiB (``ray up``).
    """

    image: str = f"prismserve:{prismserve.__version__}"
    gpus_per_node: PositiveInt = 4
    cpus_per_node: PositiveInt = 40
    memory_per_node_gib: PositiveInt = 160
    router_cpus: PositiveInt = 4
    router_memory_gib: PositiveInt = 16
    region: str = "us-west-2"
    head_machine: str = "m7i.2xlarge"
    worker_machine: str = "g6.12xlarge"
    disk_gib: PositiveInt = Field(default=200, ge=50)


@dataclass(frozen=True, slots=True)
class Packing:
    """How workers are spread over machines.

    Attributes:
        gpus_per_worker: GPUs of one worker, possibly a share of one.
        workers_per_node: workers on one machine.
        nodes: machines.
        cpus_per_worker: CPU cores of one worker.
        shared_memory_gib: what /dev/shm of one machine must hold, in GiB.
    """

    gpus_per_worker: float
    workers_per_node: int
    nodes: int
    cpus_per_worker: float
    shared_memory_gib: int


def pack(settings: Settings, target: Target) -> Packing:
    """Spread the workers over the machines of a target. ConfigurationError when one worker does not fit on any."""
    gpus = 1.0 if settings.num_gpus_per_worker is None else settings.num_gpus_per_worker
    if gpus <= 0:
        message = "num_gpus_per_worker must be above 0 to deploy on GPU nodes"
        raise ConfigurationError(message, field="num_gpus_per_worker")
    if gpus > target.gpus_per_node:
        message = f"num_gpus_per_worker is {gpus:g}, but a node has {target.gpus_per_node} GPUs"
        raise ConfigurationError(message, field="num_gpus_per_worker")
    # A worker that takes a share of a GPU never spans two.
    by_gpu = target.gpus_per_node // math.ceil(gpus) if gpus >= 1 else target.gpus_per_node * int(1 / gpus)
    per_node = min(by_gpu, settings.workers)
    if settings.cpus_per_worker is not None:
        by_cpu = int(target.cpus_per_node / settings.cpus_per_worker)
        if by_cpu == 0:
            message = f"cpus_per_worker is {settings.cpus_per_worker:g}, but a node has {target.cpus_per_node} cores"
            raise ConfigurationError(message, field="cpus_per_worker")
        per_node = min(per_node, by_cpu)
    arenas_bytes = per_node * settings.transfer.arena_bytes + _OBJECT_STORE_BYTES
    return Packing(
        gpus_per_worker=gpus,
        workers_per_node=per_node,
        nodes=math.ceil(settings.workers / per_node),
        cpus_per_worker=settings.cpus_per_worker or math.floor(target.cpus_per_node / per_node),
        shared_memory_gib=math.ceil(arenas_bytes / _GIB) + 1,
    )


def application_args(settings: Settings, packing: Packing) -> dict[str, Any]:
    """The ``args`` of the Serve application: what differs from the defaults, without secrets.

    Shares of GPUs and CPUs are always stated, since workers' nodes may join after the application was built.
    """
    values = settings.model_dump(mode="json", exclude_defaults=True, exclude={"redis_url", "ray_address"})
    stated = {"num_gpus_per_worker": packing.gpus_per_worker, "cpus_per_worker": packing.cpus_per_worker}
    return {**values, "host": "0.0.0.0", **stated}  # noqa: S104 - pods are reached from outside


def ray_cluster(settings: Settings, target: Target, config_name: str = "cluster.yaml") -> dict[str, Any]:
    """A ``ray up`` cluster: a head that routes, and GPU machines that work.

    Args:
        settings: the cluster's settings.
        target: machines.
        config_name: the configuration file, beside the cluster file.
    """
    packing = pack(settings, target)
    start = f"RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0 ray start --object-store-memory={_OBJECT_STORE_BYTES}"
    return {
        "cluster_name": APPLICATION,
        "max_workers": packing.nodes,
        "idle_timeout_minutes": 15,
        "provider": {"type": "aws", "region": target.region, "cache_stopped_nodes": False},
        "auth": {"ssh_user": "ubuntu"},
        "docker": {
            "image": target.image,
            "container_name": APPLICATION,
            "pull_before_run": True,
            # Registered memory of the transports is locked; arenas live in shared memory.
            "run_options": ["--ulimit nofile=65536:65536", "--ulimit memlock=-1:-1"],
            "head_run_options": ["--shm-size=1g"],
            "worker_run_options": [f"--shm-size={packing.shared_memory_gib}g"],
            "disable_shm_size_detection": True,
        },
        "available_node_types": {
            "head": {
                "resources": {"CPU": 0, ROUTER_RESOURCE: 1},
                "node_config": _machine(target.head_machine, target.disk_gib),
            },
            "gpu-worker": {
                "min_workers": packing.nodes,
                "max_workers": packing.nodes,
                "resources": {"CPU": target.cpus_per_node, "GPU": target.gpus_per_node},
                "node_config": _machine(target.worker_machine, target.disk_gib),
            },
        },
        "head_node_type": "head",
        "file_mounts": {
            "~/cluster.yaml": f"./{config_name}",
            "~/.ray/auth_token": "~/.ray/auth_token",
            "~/.prismserve/redis-url": "~/.prismserve/redis-url",
        },
        "head_start_ray_commands": [
            "ray stop",
            f"{start} --head --port=6379 --dashboard-host=127.0.0.1 --autoscaling-config=~/ray_bootstrap_config.yaml",
        ],
        "worker_start_ray_commands": [
            "ray stop",
            f"{start} --address=$RAY_HEAD_IP:6379",
        ],
    }


def _machine(kind: str, disk_gib: int) -> dict[str, Any]:
    disk = {"VolumeSize": disk_gib, "VolumeType": "gp3", "Encrypted": True}
    metadata = {"HttpTokens": "required", "HttpPutResponseHopLimit": 2}
    return {
        "InstanceType": kind,
        "BlockDeviceMappings": [{"DeviceName": "/dev/sda1", "Ebs": disk}],
        "MetadataOptions": metadata,
    }


def ray_service(settings: Settings, target: Target) -> list[dict[str, Any]]:
    """Kubernetes objects: the RayService, and the Service through which clients reach the routers."""
    packing = pack(settings, target)
    spec = {
        "serveConfigV2": _dump(serve_config(settings, packing)),
        "serviceUnhealthySecondThreshold": int(settings.startup_timeout_s) + 600,
        "deploymentUnhealthySecondThreshold": int(settings.startup_timeout_s),
        "excludeHeadPodFromServeSvc": True,
        "rayClusterConfig": {
            "rayVersion": RAY_VERSION,
            "authOptions": {"mode": "token"},
            "headGroupSpec": {
                "rayStartParams": {
                    "num-cpus": "0",
                    "dashboard-host": "0.0.0.0",  # noqa: S104 - the operator talks to it, with the token
                    "object-store-memory": str(_OBJECT_STORE_BYTES),
                },
                "template": _head_pod(settings, target),
            },
            "workerGroupSpecs": [
                {
                    "groupName": "router",
                    "replicas": settings.router_replicas,
                    "minReplicas": settings.router_replicas,
                    "maxReplicas": settings.router_replicas,
                    "rayStartParams": {
                        "num-cpus": "0",
                        "resources": f'"{{\\"{ROUTER_RESOURCE}\\": 1}}"',
                        "object-store-memory": str(_OBJECT_STORE_BYTES),
                    },
                    "template": _router_pod(settings, target),
                },
                {
                    "groupName": "gpu-worker",
                    "replicas": packing.nodes,
                    "minReplicas": packing.nodes,
                    "maxReplicas": packing.nodes,
                    "rayStartParams": {"object-store-memory": str(_OBJECT_STORE_BYTES)},
                    "template": _worker_pod(settings, target, packing),
                },
            ],
        },
    }
    service = {"apiVersion": "ray.io/v1", "kind": "RayService", "metadata": {"name": APPLICATION}, "spec": spec}
    return [service, _front_service(settings)]


def serve_config(settings: Settings, packing: Packing) -> dict[str, Any]:
    """The Serve configuration: one application built from the settings, without Serve's own proxies.

    The routers listen on the front doors' ports themselves, one to a pod: each claims its pod's router resource.
    """
    router = {
        "name": "router",
        "num_replicas": settings.router_replicas,
        "ray_actor_options": {"num_cpus": 0, "resources": {ROUTER_RESOURCE: 1}},
    }
    application = {
        "name": APPLICATION,
        "route_prefix": None,
        "import_path": IMPORT_PATH,
        "args": application_args(settings, packing),
        "deployments": [router],
    }
    return {"proxy_location": "Disabled", "applications": [application]}


def _front_service(settings: Settings) -> dict[str, Any]:
    ports = [("http", settings.port), ("grpc", settings.grpc_port)]
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": f"{APPLICATION}-front", "labels": labels("router")},
        "spec": {
            "selector": labels("router"),
            "ports": [{"name": name, "port": port, "targetPort": name} for name, port in ports],
        },
    }


def _head_pod(settings: Settings, target: Target) -> dict[str, Any]:
    probe = http_probe("/api/gcs_healthz", _DASHBOARD_PORT)
    return Pod(
        component="head",
        container="ray-head",
        image=target.image,
        size=_router_size(target),
        ports={"gcs-server": 6379, "dashboard": _DASHBOARD_PORT, "client": 10001},
        readiness=probe,
        liveness=probe,
        grace_s=_grace_s(settings),
    ).template()


def _router_pod(settings: Settings, target: Target) -> dict[str, Any]:
    return Pod(
        component="router",
        container="ray-worker",
        image=target.image,
        size=_router_size(target),
        ports={"http": settings.port, "grpc": settings.grpc_port},
        readiness=http_probe(READINESS_PATH, settings.port),
        liveness=http_probe("/api/local_raylet_healthz", _AGENT_PORT),
        grace_s=_grace_s(settings),
    ).template()


def _worker_pod(settings: Settings, target: Target, packing: Packing) -> dict[str, Any]:
    probe = http_probe("/api/local_raylet_healthz", _AGENT_PORT)
    return Pod(
        component="worker",
        container="ray-worker",
        image=target.image,
        size={
            "cpu": str(target.cpus_per_node),
            "memory": f"{target.memory_per_node_gib}Gi",
            GPU: str(target.gpus_per_node),
        },
        ports={},
        readiness=probe,
        liveness=probe,
        grace_s=_grace_s(settings),
        shared_memory_gib=packing.shared_memory_gib,
    ).template()


def _router_size(target: Target) -> dict[str, str]:
    return {"cpu": str(target.router_cpus), "memory": f"{target.router_memory_gib}Gi"}


def _grace_s(settings: Settings) -> int:
    return math.ceil(settings.drain_timeout_s) + _STOP_MARGIN_S


def render(config: Path, target: Target | None = None) -> dict[str, str]:
    """The text of every deployment file, by name.

    Args:
        config: the configuration file ``serve --config`` takes. The environment plays no part.
        target: machines; the default ones unless given.

    Raises:
        ConfigurationError: the configuration is wrong, or its workers fit on no machine of the target.
    """
    settings = load_settings(read_config(config), {}, origin=str(config))
    where = target or Target()
    head = (
        f"# Generated from {config.name}: python -m prismserve.cluster.deployment deploy/{config.name} --out deploy\n"
    )
    objects = ray_service(settings, where)
    return {
        "ray-cluster.yaml": head + _dump(ray_cluster(settings, where, config.name)),
        "kuberay-rayservice.yaml": head + "---\n".join(_dump(item) for item in objects),
    }


class _Dumper(yaml.SafeDumper):
    """Repeats values instead of naming them, and writes texts of several lines as blocks."""

    def ignore_aliases(self, data: object) -> bool:
        """Never an anchor: these files are read by people."""
        del data
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _represent_text)


def _dump(value: Mapping[str, Any]) -> str:
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, width=120)


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the files. Exit code 0, or 2 with one sentence when the configuration is wrong."""
    parser = argparse.ArgumentParser(prog="python -m prismserve.cluster.deployment", description=__doc__)
    parser.add_argument("config", type=Path, help="the configuration file `serve --config` takes")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the files are written")
    for name, info in Target.model_fields.items():
        parser.add_argument(
            "--" + name.replace("_", "-"), default=info.default, metavar="VALUE", help="default: %(default)s"
        )
    args = parser.parse_args(arguments)
    try:
        target = Target.model_validate({name: getattr(args, name) for name in Target.model_fields})
        files = render(args.config, target)
    except (ConfigurationError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201 - a command speaks on the terminal
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (args.out / name).write_text(text, encoding="utf-8")
        print(args.out / name)  # noqa: T201 - a command speaks on the terminal
    return 0


if __name__ == "__main__":
    sys.exit(main())
