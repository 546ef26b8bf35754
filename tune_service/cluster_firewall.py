"""Narrows ssh on AWS. A security group that Ray makes opens it to the world; one that has rules Ray leaves alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from trainables.errors import Problem
from tune_service.cluster_init import cidr_problems
from tune_service.errors import CommandError, SpecError

_SSH = {"IpProtocol": "tcp", "FromPort": 22, "ToPort": 22}


def narrow_ssh(file: Path, cidr: str) -> list[str]:
    """Lets only `cidr` reach port 22 of a cluster's nodes from outside. Makes the security group if Ray has not yet.

    Returns the ids of the security groups. Raises CommandError when AWS refuses.
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
    except (BotoCoreError, ClientError) as error:
        expected = "credentials that may change security groups"
        raise CommandError(Problem(f"security group {name}", "AWS takes the change", str(error), expected)) from error
    return [str(group["GroupId"]) for group in groups]


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
