"""Pods of a KubeRay cluster, as plain data: unprivileged, with shared memory and a model cache."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

APPLICATION: Final = "prismserve"
SECRET: Final = "prismserve"  # noqa: S105 - the name of a Kubernetes secret, not its content
GPU: Final = "nvidia.com/gpu"
_USER_ID: Final = 1000
_SHARED_MEMORY: Final = "/dev/shm"  # noqa: S108 - a mount of the pod's own, where arenas live
_MODELS: Final = "/models"


@dataclass(frozen=True, slots=True)
class Pod:
    """What distinguishes the pods of one group from those of another.

    Attributes:
        component: value of the label ``app.kubernetes.io/component``.
        container: name of the only container.
        image: of the container.
        size: resources, requested and limited alike.
        ports: TCP ports by name.
        readiness: probe.
        liveness: probe.
        grace_s: from the stop signal until it is killed, in seconds.
        shared_memory_gib: size of /dev/shm, in GiB; counts towards the memory of ``size``.
    """

    component: str
    container: str
    image: str
    size: Mapping[str, str]
    ports: Mapping[str, int]
    readiness: Mapping[str, Any]
    liveness: Mapping[str, Any]
    grace_s: int
    shared_memory_gib: int = 1

    def template(self) -> dict[str, Any]:
        """The pod template."""
        spec: dict[str, Any] = {
            # Service links would put PRISMSERVE_* variables into the pod that are not settings.
            "enableServiceLinks": False,
            "automountServiceAccountToken": False,
            "terminationGracePeriodSeconds": self.grace_s,
            "securityContext": {
                "runAsNonRoot": True,
                "runAsUser": _USER_ID,
                "runAsGroup": _USER_ID,
                "fsGroup": _USER_ID,
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            "containers": [self._container()],
            "volumes": [
                {"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": f"{self.shared_memory_gib}Gi"}},
                {"name": "models", "emptyDir": {}},
            ],
        }
        if GPU in self.size:
            spec["tolerations"] = [{"key": GPU, "operator": "Exists", "effect": "NoSchedule"}]
        return {"metadata": {"labels": labels(self.component)}, "spec": spec}

    def _container(self) -> dict[str, Any]:
        redis_url = {"secretKeyRef": {"name": SECRET, "key": "redis-url"}}
        return {
            "name": self.container,
            "image": self.image,
            "env": [
                {"name": "PRISMSERVE_REDIS_URL", "valueFrom": redis_url},
                {"name": "HF_HOME", "value": _MODELS},
                {"name": "RAY_USAGE_STATS_ENABLED", "value": "0"},
            ],
            "ports": [{"name": name, "containerPort": port} for name, port in self.ports.items()],
            "resources": {"requests": dict(self.size), "limits": dict(self.size)},
            "readinessProbe": dict(self.readiness),
            "livenessProbe": dict(self.liveness),
            "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
            "volumeMounts": [
                {"name": "shared-memory", "mountPath": _SHARED_MEMORY},
                {"name": "models", "mountPath": _MODELS},
            ],
        }


def labels(component: str) -> dict[str, str]:
    """Labels of the objects of one component."""
    return {"app.kubernetes.io/name": APPLICATION, "app.kubernetes.io/component": component}


def http_probe(path: str, port: int) -> dict[str, Any]:
    """A probe that fails after two minutes without a 2xx answer."""
    return {
        "httpGet": {"path": path, "port": port},
        "initialDelaySeconds": 10,
        "periodSeconds": 5,
        "timeoutSeconds": 2,
        "failureThreshold": 24,
    }
