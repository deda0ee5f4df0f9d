"""The files for AWS: template and policies by their linters; AWS's own services by moto, which stands in for them."""

from __future__ import annotations

import io
import json
import runpy
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import boto3
import pytest
from moto import mock_aws

from serve import sagemaker
from serve.properties import VARIABLES
from tests.conftest import ROOT

AWS = ROOT / "deploy" / "aws"
TEMPLATE, FUNCTION = AWS / "template.yaml", AWS / "lambda" / "classify.py"
POLICIES = ROOT / ".ci" / "policies"
ENDPOINT = "arn:aws:sagemaker:eu-west-1:123456789012:endpoint/beeline"
GROUP = "arn:aws:logs:eu-west-1:123456789012:log-group:"


@cache
def linter() -> dict[str, Any]:
    """Return what `.ci/policies` defines."""
    return runpy.run_path(str(POLICIES))


@cache
def resources() -> dict[str, Any]:
    """Return the template's resources with values in place of parameters and functions."""
    found: dict[str, Any] = linter()["resources"](TEMPLATE, {"Bucket": "models", "UrlHosts": "a.b"})
    return found


def of(kind: str) -> dict[str, Any]:
    """Return the properties of the resources of one kind, by name."""
    return {name: each["Properties"] for name, each in resources().items() if each["Type"] == f"AWS::{kind}"}


def planted(folder: Path, right: str, wrong: str) -> Path:
    """Return a copy of the template with a fault."""
    text = TEMPLATE.read_text()
    assert right in text
    (folder / "template.yaml").write_text(text.replace(right, wrong, 1))
    return folder / "template.yaml"


def test_the_template_passes_its_linter_which_catches_a_fault(tmp_path: Path) -> None:
    fault = planted(tmp_path, "ReservedConcurrentExecutions: 100", "ReservedConcurrency: 100")
    program = Path(sys.executable).with_name("cfn-lint")
    done = subprocess.run(
        [program, "--format", "parseable", TEMPLATE, fault], capture_output=True, text=True, check=False
    )
    (line,) = done.stdout.splitlines()
    assert done.returncode != 0
    assert line.startswith(str(fault))
    assert "'ReservedConcurrency' was unexpected" in line


@pytest.mark.parametrize(
    ("right", "wrong", "fault"),
    [
        ("sagemaker:InvokeEndpoint", "sagemaker:InvokeEndpoints", "UNKNOWN_ACTION"),
        ('${AWS::AccountId}:endpoint/${Name}"', '${AWS::AccountId}:model/${Name}"', "RESOURCE_MISMATCH"),
    ],
)
def test_a_fault_of_a_policy_is_caught(
    tmp_path: Path, right: str, wrong: str, fault: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert linter()["main"](str(planted(tmp_path, right, wrong))) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert str(tmp_path) in line
    assert fault in line


def test_the_policies_pass_and_what_is_no_template_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert linter()["main"](str(TEMPLATE)) == 0
    (tmp_path / "none.yaml").write_text("a: 1")
    assert linter()["main"](str(tmp_path / "none.yaml")) == 2
    assert capsys.readouterr().err == f"policies: {tmp_path}/none.yaml is no template ('Parameters')\n"


def test_each_role_allows_one_endpoint_and_one_log_group() -> None:
    logs = ["logs:CreateLogStream", "logs:PutLogEvents"]
    allowed = {
        name: [(each["Action"], each["Resource"]) for each in role["Policies"][0]["PolicyDocument"]["Statement"]]
        for name, role in of("IAM::Role").items()
    }
    assert allowed["FunctionRole"] == [("sagemaker:InvokeEndpoint", ENDPOINT), (logs, f"{GROUP}/aws/lambda/beeline:*")]
    assert allowed["EndpointRole"][0] == ("s3:GetObject", "arn:aws:s3:::models/model.tar.gz")
    assert allowed["EndpointRole"][-1] == (logs, f"{GROUP}/aws/sagemaker/Endpoints/beeline:*")
    groups = {each["LogGroupName"] for each in of("Logs::LogGroup").values()}
    assert groups == {"/aws/lambda/beeline", "/aws/sagemaker/Endpoints/beeline"}


def test_template_function_and_container_agree() -> None:
    (settings,) = of("Lambda::Function").values()
    assert settings["ReservedConcurrentExecutions"] == 100
    assert settings["Handler"] == f"{FUNCTION.stem}.handler"
    assert settings["Environment"]["Variables"].keys() == {"ENDPOINT_NAME"}
    (model,) = of("SageMaker::Model").values()
    assert model["PrimaryContainer"]["Environment"].keys() <= VARIABLES.keys()
    (variant,) = of("SageMaker::EndpointConfig")["EndpointConfig"]["ProductionVariants"]
    assert variant["ContainerStartupHealthCheckTimeoutInSeconds"] == sagemaker.START
    (target,), (endpoint,) = of("ApplicationAutoScaling::ScalableTarget").values(), of("SageMaker::Endpoint").values()
    assert target["ResourceId"] == f"endpoint/{endpoint['EndpointName']}/variant/{variant['VariantName']}"
    assert target["MinCapacity"] == variant["InitialInstanceCount"]


@pytest.fixture
def account() -> Iterator[None]:
    """An AWS account that moto keeps in memory."""
    with mock_aws():
        yield


def test_roles_log_groups_alarms_and_the_function_are_taken(account: None) -> None:
    """By moto, which stands in for AWS; the function's code is not run there."""
    iam, logs, watch = (boto3.client(name, "eu-west-1") for name in ("iam", "logs", "cloudwatch"))
    arns = {}
    for name, role in of("IAM::Role").items():
        arns[name] = iam.create_role(
            RoleName=name, AssumeRolePolicyDocument=json.dumps(role["AssumeRolePolicyDocument"])
        )["Role"]["Arn"]
        for policy in role["Policies"]:
            document = json.dumps(policy["PolicyDocument"])
            iam.put_role_policy(RoleName=name, PolicyName=policy["PolicyName"], PolicyDocument=document)
    for group in of("Logs::LogGroup").values():
        logs.create_log_group(logGroupName=group["LogGroupName"])
        logs.put_retention_policy(logGroupName=group["LogGroupName"], retentionInDays=group["RetentionInDays"])
    assert {each["retentionInDays"] for each in logs.describe_log_groups()["logGroups"]} == {30}
    for alarm in of("CloudWatch::Alarm").values():
        watch.put_metric_alarm(**alarm)
    alarms = {each["AlarmName"]: each for each in watch.describe_alarms()["MetricAlarms"]}
    assert alarms.keys() == {
        f"beeline-{name}" for name in ("endpoint-errors", "endpoint-latency", "function-errors", "function-throttles")
    }
    assert all(each["AlarmActions"] for each in alarms.values())
    (settings,) = of("Lambda::Function").values()
    functions = boto3.client("lambda", "eu-west-1")
    given = {name: value for name, value in settings.items() if name != "ReservedConcurrentExecutions"}
    functions.create_function(**{**given, "Role": arns["FunctionRole"], "Code": {"ZipFile": zipped()}})
    functions.put_function_concurrency(FunctionName="beeline", ReservedConcurrentExecutions=100)


def zipped() -> bytes:
    """Return the function's code as it is uploaded."""
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        archive.write(FUNCTION, FUNCTION.name)
    return data.getvalue()


def test_the_trail_sees_calls_of_the_endpoint_and_the_function(account: None) -> None:
    boto3.client("s3", "us-east-1").create_bucket(Bucket="trail")
    (trail,), (policy,) = of("CloudTrail::Trail").values(), of("S3::BucketPolicy").values()
    boto3.client("s3", "us-east-1").put_bucket_policy(Bucket="trail", Policy=json.dumps(policy["PolicyDocument"]))
    client = boto3.client("cloudtrail", "us-east-1")
    client.create_trail(Name=trail["TrailName"], S3BucketName="trail", EnableLogFileValidation=True)
    client.put_event_selectors(TrailName="beeline", AdvancedEventSelectors=trail["AdvancedEventSelectors"])
    selectors = client.get_event_selectors(TrailName="beeline")["AdvancedEventSelectors"]
    seen = {field["Equals"][0] for each in selectors for field in each["FieldSelectors"]}
    assert {"Management", "AWS::SageMaker::Endpoint", "AWS::Lambda::Function"} <= seen


def test_the_target_of_autoscaling_and_its_policy_are_taken(account: None) -> None:
    (target,) = of("ApplicationAutoScaling::ScalableTarget").values()
    (policy,) = of("ApplicationAutoScaling::ScalingPolicy").values()
    assert policy["ScalingTargetId"] == "ScalableTarget"
    client = boto3.client("application-autoscaling", "eu-west-1")
    client.register_scalable_target(**target)
    whose = {name: target[name] for name in ("ServiceNamespace", "ResourceId", "ScalableDimension")}
    client.put_scaling_policy(**whose, **{name: policy[name] for name in policy if name != "ScalingTargetId"})
    (taken,) = client.describe_scaling_policies(ServiceNamespace="sagemaker")["ScalingPolicies"]
    metric = taken["TargetTrackingScalingPolicyConfiguration"]["PredefinedMetricSpecification"]
    assert metric["PredefinedMetricType"] == "SageMakerVariantInvocationsPerInstance"
    assert taken["ResourceId"] == "endpoint/beeline/variant/AllTraffic"
