"""Ssh on AWS from one address alone: what is opened and closed, and what of others' rules is told."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import boto3
import pytest

from tune_service import cluster_firewall
from tune_service.cluster_firewall import narrow_ssh
from tune_service.errors import CommandError

CIDR = "203.0.113.7/32"
GROUP = "sg-1"
Rule = dict[str, Any]


def rule(protocol: str, ports: tuple[int, int] | None = None, **sources: Any) -> Rule:
    """As EC2 tells a rule: with every kind of source, and without ports where it is for all protocols."""
    found: Rule = {"IpProtocol": protocol, "IpRanges": [], "Ipv6Ranges": [], "PrefixListIds": []}
    if ports is not None:
        found |= {"FromPort": ports[0], "ToPort": ports[1]}
    return found | {"UserIdGroupPairs": []} | sources


def anyone(cidr: str = "0.0.0.0/0") -> dict[str, Any]:
    return {"IpRanges": [{"CidrIp": cidr}]}


INSIDE = rule("-1", UserIdGroupPairs=[{"GroupId": GROUP, "UserId": "1"}])


class Ec2:
    """One security group, which takes changes as EC2 does. It may tell what it was some looks ago."""

    def __init__(self, rules: list[Rule], late: int = 0) -> None:
        self.rules = copy.deepcopy(rules)
        self.told = [copy.deepcopy(rules)] * (1 + late)

    def describe_security_groups(self, **which: Any) -> dict[str, Any]:
        rules = self.told.pop(0) if self.told else self.rules
        return {"SecurityGroups": [{"GroupId": GROUP, "IpPermissions": copy.deepcopy(rules)}]}

    def authorize_security_group_ingress(self, **change: Any) -> None:
        self.rules += [rule("tcp", (22, 22)) | each for each in change["IpPermissions"]]

    def revoke_security_group_ingress(self, **change: Any) -> None:
        for each in change["IpPermissions"]:
            for kind, name in (("IpRanges", "CidrIp"), ("Ipv6Ranges", "CidrIpv6")):
                gone = [source[name] for source in each.get(kind, [])]
                for own in self.rules:
                    if (own["IpProtocol"], own.get("FromPort"), own.get("ToPort")) == ("tcp", 22, 22):
                        own[kind] = [source for source in own[kind] if source[name] not in gone]

    def open_to(self) -> set[str]:
        """The ranges that rules for port 22 alone let in."""
        ssh = [each for each in self.rules if each.get("FromPort") == 22 == each.get("ToPort")]
        ranges = {source["CidrIp"] for each in ssh for source in each["IpRanges"]}
        return ranges | {source["CidrIpv6"] for each in ssh for source in each["Ipv6Ranges"]}


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(cluster_firewall, "SETTLE_TIMEOUT_S", 0.0)
    path = tmp_path / "cluster.yaml"
    path.write_text("cluster_name: c\nprovider: {type: aws, region: us-west-2}\n")
    return path


def narrowed(file: Path, ec2: Ec2, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What still lets others reach port 22, as the error says it."""
    monkeypatch.setattr(boto3, "client", lambda service, region_name: ec2)
    try:
        assert narrow_ssh(file, CIDR) == [GROUP]
    except CommandError as error:
        assert {problem.place for problem in error.problems} == {f"security group {GROUP}"}
        return [problem.found for problem in error.problems]
    return []


def test_the_world_is_closed_out_and_one_range_let_in(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = rule("tcp", (22, 22), Ipv6Ranges=[{"CidrIpv6": "::/0"}], **anyone())
    ec2 = Ec2([INSIDE, world])
    assert narrowed(file, ec2, monkeypatch) == []
    assert ec2.open_to() == {CIDR}
    assert INSIDE in ec2.rules


@pytest.mark.parametrize(
    ("other", "found"),
    [
        (rule("-1", **anyone()), "all protocols from 0.0.0.0/0"),
        (rule("-1", Ipv6Ranges=[{"CidrIpv6": "::/0"}]), "all protocols from ::/0"),
        (rule("tcp", (0, 65535), **anyone()), "tcp 0-65535 from 0.0.0.0/0"),
        (rule("tcp", (20, 22), **anyone("198.51.100.0/24")), "tcp 20-22 from 198.51.100.0/24"),
        (rule("tcp", (22, 22), PrefixListIds=[{"PrefixListId": "pl-1"}]), "tcp 22-22 from pl-1"),
        (rule("tcp", (22, 22), UserIdGroupPairs=[{"GroupId": "sg-2"}]), "tcp 22-22 from sg-2"),
    ],
)
def test_a_rule_that_still_lets_others_in_is_told(
    other: Rule, found: str, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ec2 = Ec2([INSIDE, other, rule("tcp", (22, 22), **anyone())])
    assert narrowed(file, ec2, monkeypatch) == [found]
    assert other in ec2.rules, "a rule that is for more than ssh is the user's own"
    assert ec2.open_to() == {CIDR}, "what could be closed was closed"


def test_every_such_rule_is_told(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    both = [{"CidrIp": "0.0.0.0/0"}, {"CidrIp": CIDR}, {"CidrIp": "10.0.0.0/8"}]
    ec2 = Ec2([INSIDE, rule("-1", IpRanges=both), rule("tcp", (22, 80), **anyone())])
    assert narrowed(file, ec2, monkeypatch) == [
        "all protocols from 0.0.0.0/0",
        "all protocols from 10.0.0.0/8",
        "tcp 22-80 from 0.0.0.0/0",
    ]


@pytest.mark.parametrize(
    "other",
    [
        rule("tcp", (8265, 8265), **anyone()),
        rule("tcp", (23, 65535), **anyone()),
        rule("udp", (0, 65535), **anyone()),
        rule("icmp", (-1, -1), **anyone()),
        rule("-1", **anyone(CIDR)),
    ],
)
def test_a_rule_that_opens_no_ssh_or_is_of_the_range_itself_is_no_fault(
    other: Rule, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert narrowed(file, Ec2([INSIDE, other]), monkeypatch) == []


def test_a_rule_that_aws_has_not_forgotten_yet_is_looked_up_again(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster_firewall, "SETTLE_TIMEOUT_S", 5.0)
    ec2 = Ec2([INSIDE, rule("tcp", (22, 22), **anyone())], late=1)
    assert narrowed(file, ec2, monkeypatch) == []
