"""The keys that Ray's cluster launcher takes. It looks at none inside `provider` and `node_config` by itself.

A shape says what may stand somewhere: a mapping with the shapes of its keys ("*": any key), a list with the shape of
its items, a type, a set of words, or None for anything.
"""

from __future__ import annotations

import json
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

Shape = dict[str, Any] | list[Any] | type | frozenset[str] | None

_ANY_PROVIDER: dict[str, Shape] = {
    "type": str,
    "use_internal_ips": bool,
    "disable_node_updaters": bool,
    "disable_launch_config_check": bool,
    "foreground_node_launch": bool,
    "worker_liveness_check": bool,
}
_PROVIDERS: dict[str, dict[str, Shape]] = {
    "aws": {
        "region": str,
        "availability_zone": str,
        "cache_stopped_nodes": bool,
        "use_external_head_ip": bool,
        "key_pair": {"key_name": str},
        "aws_credentials": {"aws_access_key_id": str, "aws_secret_access_key": str, "aws_session_token": str},
        "cloudwatch": None,
    },
    "gcp": {
        "region": str,
        "availability_zone": str,
        "project_id": str,
        "cache_stopped_nodes": bool,
        "gcp_credentials": {"type": str, "credentials": str},
    },
    "local": {"head_ip": str, "external_head_ip": str, "worker_ips": [str], "coordinator_address": str},
}

_DISK: Shape = {
    **dict.fromkeys(("autoDelete", "boot", "forceAttach"), bool),
    **dict.fromkeys(("deviceName", "interface", "kind", "mode", "savedState", "source", "type"), str),
    **dict.fromkeys(("diskEncryptionKey", "diskSizeGb", "guestOsFeatures", "index")),
    "initializeParams": {
        **dict.fromkeys(("architecture", "description", "diskName", "diskType", "sourceImage", "sourceSnapshot"), str),
        **dict.fromkeys(("diskSizeGb", "labels", "licenses")),
        **dict.fromkeys(("enableConfidentialCompute", "onUpdateAction", "provisionedIops", "provisionedThroughput")),
        **dict.fromkeys(("replicaZones", "resourceManagerTags", "resourcePolicies", "storagePool")),
        **dict.fromkeys(("sourceImageEncryptionKey", "sourceSnapshotEncryptionKey")),
    },
}
_NETWORK_INTERFACE: Shape = {
    **dict.fromkeys(("aliasIpRanges", "internalIpv6PrefixLength", "ipv6AccessConfigs", "ipv6Address", "kind", "name")),
    **dict.fromkeys(("network", "networkAttachment", "networkIP", "nicType", "queueCount", "stackType", "subnetwork")),
    "accessConfigs": [
        dict.fromkeys(("kind", "name", "natIP", "networkTier", "publicPtrDomainName", "setPublicPtr", "type"))
    ],
}
_SCHEDULING: Shape = {
    **dict.fromkeys(("availabilityDomain", "hostErrorTimeoutSeconds", "localSsdRecoveryTimeout", "locationHint")),
    **dict.fromkeys(("maxRunDuration", "minNodeCpus", "nodeAffinities", "onInstanceStopAction", "terminationTime")),
    "automaticRestart": bool,
    "preemptible": bool,
    "instanceTerminationAction": frozenset({"DELETE", "STOP"}),
    "onHostMaintenance": frozenset({"MIGRATE", "TERMINATE"}),
    "provisioningModel": frozenset({"STANDARD", "SPOT", "RESERVATION_BOUND", "FLEX_START"}),
}
_GCP_INSTANCE: Shape = {
    **dict.fromkeys(("canIpForward", "deletionProtection", "description", "hostname", "instanceEncryptionKey")),
    **dict.fromkeys(("keyRevocationActionType", "labels", "minCpuPlatform", "networkPerformanceConfig", "params")),
    **dict.fromkeys(("privateIpv6GoogleAccess", "resourcePolicies", "sourceInstanceTemplate", "sourceMachineImage")),
    **dict.fromkeys(("sourceMachineImageEncryptionKey", "confidentialInstanceConfig", "advancedMachineFeatures")),
    "machineType": str,
    "disks": [_DISK],
    "networkInterfaces": [_NETWORK_INTERFACE],
    "scheduling": _SCHEDULING,
    "guestAccelerators": [{"acceleratorType": str, "acceleratorCount": int}],
    "metadata": {"fingerprint": str, "kind": str, "items": [{"key": str, "value": None}]},
    "serviceAccounts": [{"email": str, "scopes": [str]}],
    "tags": {"fingerprint": str, "items": [str]},
    "displayDevice": {"enableDisplay": bool},
    "reservationAffinity": {"consumeReservationType": str, "key": str, "values": [str]},
    "shieldedInstanceConfig": dict.fromkeys(("enableIntegrityMonitoring", "enableSecureBoot", "enableVtpm"), bool),
}
"""Instance of Compute Engine's REST API v1, what one may set of it, and Ray's own `sourceInstanceTemplate`."""


def cluster_shape(provider: str) -> Shape:
    """The shape of a whole cluster file for aws, gcp or local."""
    shape = _of_schema(_ray_schema())
    assert isinstance(shape, dict)
    shape["file_mounts"] = {"*": str}
    shape["provider"] = _ANY_PROVIDER | _PROVIDERS[provider]
    if provider == "local":
        del shape["available_node_types"], shape["head_node_type"]  # Ray makes the one type of such a cluster itself
        shape["min_workers"] = int
        return shape
    node_config = _GCP_INSTANCE
    if provider == "aws":
        permissions, node_config = _ec2()
        shape["provider"]["security_group"] = {"GroupName": str, "IpPermissions": permissions}
    shape["available_node_types"]["*"]["node_config"] = node_config
    return shape


def _ray_schema() -> Any:
    """The JSON schema in Ray's package, read without importing that."""
    ray = find_spec("ray")
    assert ray is not None and ray.origin is not None
    return json.loads((Path(ray.origin).parent / "autoscaler/ray-schema.json").read_text(encoding="utf-8"))


def _of_schema(schema: Any) -> Shape:
    shape = {name: _of_schema(inner) for name, inner in schema.get("properties", {}).items()}
    if "patternProperties" in schema:
        (shape["*"],) = map(_of_schema, schema["patternProperties"].values())
    return shape or None  # of types, Ray's own validation says enough


@lru_cache(maxsize=1)
def _ec2() -> tuple[Shape, Shape]:
    """The shapes of a security group's rules, and of RunInstances as Ray calls it."""
    from botocore.session import Session

    service = Session().get_service_model("ec2")
    ingress = service.operation_model("AuthorizeSecurityGroupIngress").input_shape.members["IpPermissions"]
    instance = _of_botocore(service.operation_model("RunInstances").input_shape)
    assert isinstance(instance, dict)
    for set_by_ray in ("MinCount", "MaxCount", "SubnetId", "DryRun"):
        del instance[set_by_ray]
    instance["SubnetIds"] = [str]
    # Any word: AWS has new machine types more often than this file has a new botocore.
    instance["InstanceType"] = str
    return _of_botocore(ingress), instance


def _of_botocore(shape: Any) -> Shape:
    match shape.type_name:
        case "structure":
            return {name: _of_botocore(member) for name, member in shape.members.items()}
        case "list":
            return [_of_botocore(shape.member)]
        case "map":
            return {"*": _of_botocore(shape.value)}
        case "string":
            return frozenset(shape.enum) if shape.enum else str
        case "boolean":
            return bool
        case "integer" | "long":
            return int
    return None
