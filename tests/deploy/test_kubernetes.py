"""The Kubernetes files: each is valid by the API's own schemas, and they agree with each other."""

from __future__ import annotations

import functools
import importlib.metadata
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate  # type: ignore[import-untyped]
import pytest
import yaml
from torch.distributed.run import get_args_parser

from serve.metrics import Collector
from serve.properties import VARIABLES
from tests.conftest import ROOT, worker

FOLDER = ROOT / "deploy" / "kubernetes"
KUSTOMIZATION = FOLDER / "kustomization.yaml"
RULE = FOLDER / "prometheus-adapter-rule.yaml"
FILES = sorted(path.name for path in FOLDER.glob("*.yaml") if path not in (KUSTOMIZATION, RULE))
# The oldest in which every field in use counts by default, and the newest whose schemas are there.
VERSIONS = ("1.27", "1.37")
# What the settings of one model are called in the environment.
OF_MODELS = {"BATCH_SIZE", "WORKERS", "LINGER_MS"}


@functools.cache
def read(name: str) -> Any:
    """Return one file's document."""
    return yaml.safe_load((FOLDER / name).read_text(encoding="utf-8"))


def pod() -> Any:
    return read("deployment.yaml")["spec"]["template"]


def server() -> Any:
    (container,) = pod()["spec"]["containers"]
    return container


def settings() -> dict[str, str]:
    return {one["name"]: one["value"] for one in server()["env"]}


def ports() -> dict[str, int]:
    return {one["name"]: one["containerPort"] for one in server()["ports"]}


def render() -> list[Any]:
    """Return the documents that kubectl makes of the folder."""
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("no kubectl on the PATH to render with (Debian: apt-get install kubernetes-client)")
    done = subprocess.run([kubectl, "kustomize", str(FOLDER)], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", FILES)
def test_every_resource_is_valid(name: str, version: str) -> None:
    # It falls back to an older version in silence, and says which it took.
    assert kubernetes_validate.validate(read(name), version, strict=True) == version


def test_the_kustomization_lists_every_resource_with_the_tag_of_this_version() -> None:
    kustomization = read(KUSTOMIZATION.name)
    assert sorted(kustomization["resources"]) == FILES
    assert kustomization["images"] == [{"name": server()["image"], "newTag": importlib.metadata.version("beeline")}]
    assert kustomization["namespace"] == read("namespace.yaml")["metadata"]["name"]


@pytest.mark.server
def test_it_renders_to_the_same_resources_in_one_namespace_with_the_images_tag() -> None:
    documents = render()
    for document in documents:
        kubernetes_validate.validate(document, VERSIONS[-1], strict=True)
        if document["kind"] != "Namespace":
            assert document["metadata"].pop("namespace") == read("namespace.yaml")["metadata"]["name"]
    rendered = {document["kind"]: document for document in documents}
    container = rendered["Deployment"]["spec"]["template"]["spec"]["containers"][0]
    assert container["image"] == f"beeline-cpu:{importlib.metadata.version('beeline')}"
    container["image"] = server()["image"]
    assert rendered == {read(name)["kind"]: read(name) for name in FILES}
    assert len(documents) == len(FILES)


def test_all_resources_select_the_same_pods() -> None:
    labels = pod()["metadata"]["labels"]
    (spread,) = pod()["spec"]["topologySpreadConstraints"]
    for selector in (
        read("deployment.yaml")["spec"]["selector"]["matchLabels"],
        read("service.yaml")["spec"]["selector"],
        read("pod-disruption-budget.yaml")["spec"]["selector"]["matchLabels"],
        read("network-policy.yaml")["spec"]["podSelector"]["matchLabels"],
        spread["labelSelector"]["matchLabels"],
    ):
        assert selector == labels
    deployment = read("deployment.yaml")
    assert read("horizontal-pod-autoscaler.yaml")["spec"]["scaleTargetRef"] == {
        "apiVersion": deployment["apiVersion"],
        "kind": deployment["kind"],
        "name": deployment["metadata"]["name"],
    }


def test_ports_agree() -> None:
    assert ports() == {"http": 8080, "metrics": 8082}
    (service,) = read("service.yaml")["spec"]["ports"]
    assert service["targetPort"] == "http"
    annotations = pod()["metadata"]["annotations"]
    assert annotations["prometheus.io/port"] == str(ports()["metrics"])
    assert settings()["BEELINE_METRICS_ADDRESS"] == f"http://0.0.0.0:{ports()['metrics']}"
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert server()[probe]["httpGet"] == {"path": "/ping", "port": "http"}


def test_nothing_opens_management() -> None:
    assert [name for name in FILES if "8081" in json.dumps(read(name))] == []
    # A rule without ports would open all of them.
    assert all(rule["ports"] for rule in read("network-policy.yaml")["spec"]["ingress"])


def test_the_network_policy_opens_the_page_to_all_metrics_to_one_namespace_and_nothing_outwards() -> None:
    spec = read("network-policy.yaml")["spec"]
    assert sorted(spec["policyTypes"]) == ["Egress", "Ingress"]
    assert spec["egress"] == []
    everybody, monitoring = spec["ingress"]
    assert everybody == {"ports": [{"protocol": "TCP", "port": ports()["http"]}]}
    assert monitoring["ports"] == [{"protocol": "TCP", "port": ports()["metrics"]}]
    assert [sorted(one) for one in monitoring["from"]] == [["namespaceSelector"]]


def test_a_pod_has_no_rights() -> None:
    spec = pod()["spec"]
    assert spec["automountServiceAccountToken"] is False
    assert spec["enableServiceLinks"] is False
    assert spec["securityContext"] == {
        "runAsNonRoot": True,
        "runAsUser": 10001,
        "runAsGroup": 10001,
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    assert server()["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert not {"hostNetwork", "hostPID", "hostIPC", "serviceAccountName", "initContainers"} & set(spec)


def test_a_pod_has_enough_time_to_start_and_to_end() -> None:
    assert set(settings()) <= {*VARIABLES, *OF_MODELS}
    startup = server()["startupProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] == 180
    drain, stop = (int(settings()[f"BEELINE_{name}_SECONDS"]) for name in ("DRAIN", "STOP"))
    grace = pod()["spec"]["terminationGracePeriodSeconds"]
    assert grace > drain + stop
    # While a pod drains /ping is 503, and it must not be restarted.
    liveness = server()["livenessProbe"]
    assert liveness["periodSeconds"] * liveness["failureThreshold"] > 2 * grace
    assert "lifecycle" not in server()


def test_a_pod_has_the_memory_of_the_sum_in_its_comment_and_each_worker_a_core() -> None:
    text = (FOLDER / "deployment.yaml").read_text(encoding="utf-8")
    *parts, total = map(int, re.findall(r"^ +# +(\d+)  \S", text, re.MULTILINE))
    requests, limits = (server()["resources"][kind] for kind in ("requests", "limits"))
    # Java's heap may be a quarter of the limit.
    assert sum(parts) == total < int(limits["memory"].removesuffix("Gi")) * 2**30 / 1e6 - 500
    assert parts[:2] == [int(settings()["WORKERS"]) * int(each) for each in re.findall(r"(\d+) each", text)]
    assert requests["memory"] == limits["memory"]
    (volume,) = pod()["spec"]["volumes"]
    assert volume["emptyDir"]["medium"] == "Memory"
    assert round(int(volume["emptyDir"]["sizeLimit"].removesuffix("Mi")) * 2**20 / 1e6) == parts[-1]
    assert server()["volumeMounts"] == [{"name": volume["name"], "mountPath": "/tmp"}]
    # One core more, for Java, nginx and the prober.
    assert requests["cpu"] == settings()["WORKERS"]
    assert int(limits["cpu"]) > int(requests["cpu"])


def test_an_update_starts_a_pod_before_it_stops_another() -> None:
    spec = read("deployment.yaml")["spec"]
    assert spec["strategy"] == {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}}
    # Every apply would undo the autoscaler's number.
    assert "replicas" not in spec


def test_a_host_can_be_emptied_at_the_smallest_number_of_pods() -> None:
    autoscaler = read("horizontal-pod-autoscaler.yaml")["spec"]
    assert autoscaler["minReplicas"] > read("pod-disruption-budget.yaml")["spec"]["maxUnavailable"] == 1
    assert autoscaler["maxReplicas"] > autoscaler["minReplicas"]


def test_the_autoscaler_uses_the_metric_that_the_rule_makes_of_a_published_one(tmp_path: Path) -> None:
    (rule,) = read(RULE.name)["rules"]["custom"]
    metrics = read("horizontal-pod-autoscaler.yaml")["spec"]["metrics"]
    assert rule["name"]["as"] in [one["pods"]["metric"]["name"] for one in metrics if one["type"] == "Pods"]
    series = rule["seriesQuery"].partition("{")[0]
    worker(tmp_path)
    published = {metric.name for metric in Collector(tmp_path).collect() if metric.type == "histogram"}
    assert series.removesuffix("_bucket") in published
    # The adapter fills in these marks.
    assert set(re.findall(r"<<(.*?)>>", rule["metricsQuery"])) == {".GroupBy", ".Series", ".LabelMatchers"}
    # promtool tests the same query.
    marks = {
        ".GroupBy": "pod",
        ".Series": "beeline_queue_seconds_bucket",
        ".LabelMatchers": 'namespace="beeline",pod=~"a|b"',
    }
    filled = re.sub(r"<<(.*?)>>", lambda found: marks[found[1]], rule["metricsQuery"])
    tests = yaml.safe_load((ROOT / "tests" / "config" / "rules.yml").read_text(encoding="utf-8"))["tests"]
    assert filled in [one["expr"] for test in tests for one in test.get("promql_expr_test", ())]


@pytest.mark.parametrize("version", VERSIONS)
def test_a_training_job_is_one_leader_and_workers_whose_pods_are_valid_and_whose_words_torchrun_takes(
    version: str,
) -> None:
    """The job itself is checked in form only: kubernetes-validate has no schemas of other people's resources."""
    job = yaml.safe_load((FOLDER.parent / "training/pytorchjob.yaml").read_text(encoding="utf-8"))
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    master, worker = (job["spec"]["pytorchReplicaSpecs"].pop(role) for role in ("Master", "Worker"))
    for each in (master, worker):
        pod = {"apiVersion": "v1", "kind": "Pod", **each["template"]}
        assert kubernetes_validate.validate(pod, version, strict=True) == version
        (container,) = pod["spec"]["containers"]
        assert container["name"] == "pytorch", "the operator sets the environment of no other container"
        assert container["image"] == f"beeline-archive:{importlib.metadata.version('beeline')}"
        words = get_args_parser().parse_args([re.sub(r"\$\(\w+\)", "1", one) for one in container["args"]])
        assert (words.module, words.training_script, words.training_script_args[0]) == (True, "cli", "train")
        assert (1, int(words.nnodes)) == (master["replicas"], 1 + worker["replicas"])
