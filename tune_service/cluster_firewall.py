"""Narrows ssh on AWS. A security group that Ray makes opens it to the world; one that has rules Ray leaves alone."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from trainables.errors import Problem
from tune_service.cluster_init import cidr_problems
from tune_service.errors import CommandError, SpecError

_SSH = {"IpProtocol": "tcp", "FromPort": 22, "ToPort": 22}
SETTLE_TIMEOUT_S = 5.0
"""For so long AWS may still tell of a rule that it has just removed."""


def narrow_ssh(file: Path, cidr: str) -> list[str]:
    """Lets only `cidr` reach port 22 of a cluster's nodes from outside. Makes the security group if Ray has not yet.

    Only ranges of addresses, in rules for port 22 alone, are changed. Returns the ids of the security groups. Raises
    CommandError when AWS refuses, and with every rule that still lets others reach port 22.
    """
    import boto3
    from botocore.exceptions import BotoCoreError, ClientError

    problems = list(cidr_problems(cidr))
    if problems:
        raise SpecError(problems)
    try:
        config = yaml.safe_load(file.read_text(encoding="utf-8"))
        cluster, provider = config["cluster_name"], config["provider"]
        is_aws = provider["type"] == "aws"
    except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
        raise SpecError(Problem(str(file), "a cluster file can be read", str(error), "one of cluster init")) from error
    if not is_aws:
        rule = "security groups are of AWS"
        raise SpecError(Problem(f"{file} provider.type", rule, str(provider["type"]), "the firewall of that network"))
    name = provider.get("security_group", {}).get("GroupName", f"ray-autoscaler-{cluster}")
    try:
        ec2 = boto3.client("ec2", region_name=provider["region"])
        of_cluster = [
            {"Name": "group-name", "Values": [name]},
            {"Name": "tag:ray-cluster-name", "Values": [cluster]},
        ]
        groups = ec2.describe_security_groups(Filters=of_cluster)["SecurityGroups"] or [_create(ec2, name, cluster)]
        for group in groups:
            _narrow(ec2, group, cidr)
        ids = [str(group["GroupId"]) for group in groups]
        left = _left_open(ec2, ids, cidr)
    except (BotoCoreError, ClientError) as error:
        expected = "credentials that may change security groups"
        raise CommandError(Problem(f"security group {name}", "AWS takes the change", str(error), expected)) from error
    if left:
        raise CommandError(left)
    return ids


def _create(ec2: Any, name: str, cluster: str) -> dict[str, Any]:
    """The group as Ray would make it, but closed to the outside."""
    vpcs = ec2.describe_vpcs(Filters=[{"Name": "is-default", "Values": ["true"]}])["Vpcs"]
    if not vpcs:
        rule = "a new security group goes to the region's default VPC"
        raise CommandError(Problem(f"security group {name}", rule, "no default VPC", "call this again after ray up"))
    tags = [{"Key": "ray-cluster-name", "Value": cluster}]
    group_id = ec2.create_security_group(
        GroupName=name,
        Description="Nodes of a tuning cluster",
        VpcId=vpcs[0]["VpcId"],
        TagSpecifications=[{"ResourceType": "security-group", "Tags": tags}],
    )["GroupId"]
    inside = {"IpProtocol": "-1", "UserIdGroupPairs": [{"GroupId": group_id}]}
    ec2.authorize_security_group_ingress(GroupId=group_id, IpPermissions=[inside])
    return {"GroupId": group_id, "IpPermissions": []}


def _narrow(ec2: Any, group: dict[str, Any], cidr: str) -> None:
    """Opens first and closes then, so that a session from `cidr` lives on."""
    ssh = [each for each in group["IpPermissions"] if all(each.get(key) == value for key, value in _SSH.items())]
    ranges = [found["CidrIp"] for each in ssh for found in each.get("IpRanges", [])]
    ranges6 = [found["CidrIpv6"] for each in ssh for found in each.get("Ipv6Ranges", [])]
    if cidr not in ranges:
        opened = _SSH | {"IpRanges": [{"CidrIp": cidr, "Description": "ssh"}]}
        ec2.authorize_security_group_ingress(GroupId=group["GroupId"], IpPermissions=[opened])
    closed = [_SSH | {"IpRanges": [{"CidrIp": each}]} for each in ranges if each != cidr]
    closed += [_SSH | {"Ipv6Ranges": [{"CidrIpv6": each}]} for each in ranges6]
    if closed:
        ec2.revoke_security_group_ingress(GroupId=group["GroupId"], IpPermissions=closed)


def _left_open(ec2: Any, ids: list[str], cidr: str) -> list[Problem]:
    """Every rule through which others than `cidr` and the group's own members reach port 22, looked up anew."""
    end = time.monotonic() + SETTLE_TIMEOUT_S
    while True:
        groups = ec2.describe_security_groups(GroupIds=ids)["SecurityGroups"]
        left = [
            Problem(
                f"security group {group['GroupId']}",
                f"from outside, {cidr} alone reaches port 22",
                f"{_ports(rule)} from {source}",
                "that rule removed by you: only ranges in rules for port 22 alone are changed here",
            )
            for group in groups
            for rule in group["IpPermissions"]
            if _covers_ssh(rule)
            for source in _sources(rule, group["GroupId"])
            if source != cidr
        ]
        if not left or time.monotonic() > end:
            return left
        time.sleep(0.5)


def _covers_ssh(rule: dict[str, Any]) -> bool:
    if rule["IpProtocol"] == "-1":  # all protocols, all ports
        return True
    return rule["IpProtocol"] in ("tcp", "6") and rule.get("FromPort", 0) <= 22 <= rule.get("ToPort", 65535)


def _sources(rule: dict[str, Any], own_id: str) -> Iterator[str]:
    """Who a rule lets in, without the members of its group."""
    for kind, name in (("IpRanges", "CidrIp"), ("Ipv6Ranges", "CidrIpv6"), ("PrefixListIds", "PrefixListId")):
        yield from (str(each[name]) for each in rule.get(kind, []))
    for pair in rule.get("UserIdGroupPairs", []):
        if pair.get("GroupId") != own_id:
            yield str(pair.get("GroupId") or pair.get("GroupName"))


def _ports(rule: dict[str, Any]) -> str:
    if rule["IpProtocol"] == "-1":
        return "all protocols"
    return f"tcp {rule.get('FromPort', 0)}-{rule.get('ToPort', 65535)}"
