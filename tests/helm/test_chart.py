"""The chart, rendered by Helm's own engine in every mode and held against the schemas of what it makes."""

from __future__ import annotations

import itertools
import json
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from jsonschema import Draft202012Validator, ValidationError

from poise.env import RAY_DEFAULTS
from poise.kinds import KINDS
from poise.secrets import is_secret_variable
from poise.spec import load

ROOT = Path(__file__).parents[2]
CHART = ROOT / "helm" / "poise"
CRDS = json.loads((Path(__file__).parent / "crds.schema.json").read_text())
SPEC = (ROOT / "jobs" / "digits.yaml").read_text()

JOB = {"enabled": True, "spec": SPEC, "set": ["store=s3://bucket/runs", "common.digits.train.epochs=2"]}
GPU = {"gpu": {"enabled": True, "image": "poise:0.1.0-gpu"}}
EXTRAS = {
    "s3": {"secretName": "s3-keys", "region": "eu-west-1", "endpoint": "https://s3.example.org"},
    "sharedVolume": {"claimName": "shared"},
    "environment": {"OMP_NUM_THREADS": "4"},
    "serviceAccount": {"annotations": {"eks.amazonaws.com/role-arn": "arn:aws:iam::1:role/poise"}},
    "labels": {"kueue.x-k8s.io/queue-name": "research"},
    "auth": {"secretName": "token"},
    "image": {"pullSecrets": ["registry"]},
    "head": {"nodeSelector": {"pool": "heads"}, "tolerations": [{"key": "heads", "operator": "Exists"}]},
}
MODES = {
    f"{job}-{gpu}-{monitors}-{extras}": {
        **({"job": JOB} if job == "job" else {}),
        **({"workers": GPU} if gpu == "gpu" else {}),
        **({"monitoring": {"enabled": True}} if monitors == "monitors" else {}),
        **(EXTRAS if extras == "extras" else {}),
    }
    for job, gpu, monitors, extras in itertools.product(
        ("job", "cluster"), ("gpu", "cpu"), ("monitors", "unwatched"), ("extras", "plain")
    )
}


def cluster_of(objects: dict[str, dict[str, Any]]) -> dict[str, Any]:
    for document in objects.values():
        if document["kind"] == "RayCluster":
            return document["spec"]
        if document["kind"] == "RayJob":
            return document["spec"]["rayClusterSpec"]
    raise AssertionError("neither a cluster nor a job")


def pods(objects: dict[str, dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Every pod that the operator is told to make."""
    cluster = cluster_of(objects)
    yield cluster["headGroupSpec"]["template"]
    yield from (group["template"] for group in cluster["workerGroupSpecs"])
    yield from (job["spec"]["submitterPodTemplate"] for job in objects.values() if job["kind"] == "RayJob")


def check(document: dict[str, Any]) -> None:
    if document["kind"] in CRDS["$defs"]:
        Draft202012Validator({**CRDS, "$ref": f"#/$defs/{document['kind']}"}).validate(document)
    else:
        kubernetes_validate.validate(document, "1.37", strict=True)


@pytest.mark.parametrize("mode", MODES)
def test_every_object_is_what_its_kind_allows(mode, render):
    objects = render(MODES[mode])
    for document in objects.values():
        check(document)
    for template in pods(objects):
        check({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod", **template["metadata"]}, **template})
    kinds = {document["kind"] for document in objects.values()}
    assert ("RayJob" in kinds, "RayCluster" in kinds) == (mode.startswith("job"), mode.startswith("cluster"))
    assert {"ServiceAccount", "NetworkPolicy", "PodDisruptionBudget"} <= kinds
    assert ({"PodMonitor", "PrometheusRule"} <= kinds) == ("monitors" in mode)


@pytest.mark.parametrize("mode", MODES)
def test_every_pod_may_run_in_a_restricted_namespace(mode, render):
    """Pod Security Standards, profile restricted."""
    for template in pods(render(MODES[mode])):
        pod = template["spec"]
        assert pod["securityContext"]["runAsNonRoot"]
        assert pod["securityContext"]["seccompProfile"]["type"] == "RuntimeDefault"
        for container in pod["containers"]:
            context = container["securityContext"]
            assert (context["allowPrivilegeEscalation"], context["capabilities"]) == (False, {"drop": ["ALL"]})
            assert context["runAsNonRoot"]
        assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys()
        assert all(
            set(volume) & {"emptyDir", "configMap", "persistentVolumeClaim"} for volume in pod.get("volumes", [])
        )


def test_strict_checks_catch_a_typo(render):
    objects = render({"job": JOB})
    job = objects["RayJob/demo-run"]
    job["spec"]["rayClusterSpec"]["headGroupSpec"]["rayStartParam"] = {}
    with pytest.raises(ValidationError, match="rayStartParam"):
        check(job)
    policy = objects["NetworkPolicy/demo"]
    policy["spec"]["ingres"] = []
    with pytest.raises(kubernetes_validate.ValidationError, match="ingres"):
        check(policy)


@pytest.mark.parametrize("values", [{}, {"job": JOB, "workers": GPU, "monitoring": {"enabled": True}, **EXTRAS}])
def test_helm_has_nothing_to_complain_of(values, helm):
    found = helm("lint", "helm/poise", values)
    assert not found["errors"]
    assert [message["error"] for message in found["messages"]] == ["icon is recommended"]


WRONG = {
    "a typo": ({"wokers": {}}, "wokers"),
    "a typo deep down": ({"workers": {"cpu": {"cpu": 4}}}, "cpu"),
    "a word for a number": ({"workers": {"cpu": {"maxReplicas": "four"}}}, "integer"),
    "a number for a word": ({"head": {"memory": 8}}, "string"),
    "memory without a unit": ({"head": {"memory": "8 GB"}}, "pattern"),
    "no GPU for GPUs": ({"workers": {"gpu": {"gpus": 0}}}, "minimum"),
    "an unknown mode": ({"auth": {"mode": "password"}}, "token"),
    "a secret in the environment": ({"environment": {"AWS_SECRET_ACCESS_KEY": "x"}}, "AWS_SECRET_ACCESS_KEY"),
    "credentials in the endpoint": ({"s3": {"endpoint": "https://me:mine@host"}}, "pattern"),
    "a key": ({"s3": {"secretAccessKey": "x"}}, "secretAccessKey"),
    "a change that a shell would read": ({"job": {"set": ["name=$(reboot)"]}}, "pattern"),
    "a relative path": ({"job": {"path": "jobs/quickstart.yaml"}}, "pattern"),
    "a name that no object may have": ({"job": {"name": "My_Run"}}, "pattern"),
}


@pytest.mark.parametrize("case", WRONG)
def test_values_that_are_wrong_are_refused_by_the_schema(case, render):
    values, named = WRONG[case]
    with pytest.raises(RuntimeError, match=f"(?s)HelmValuesError: .*{re.escape(named)}"):
        render(values)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"job": {"enabled": True}}, "a job needs either job.spec"),
        ({"job": {"enabled": True, "spec": "x", "path": "/x"}}, "a job needs either job.spec"),
        ({"workers": {"cpu": {"enabled": False}}}, "enable workers.cpu or workers.gpu"),
        ({"workers": {"cpu": {"minReplicas": 9}}}, "minReplicas 9 is above maxReplicas 4"),
        (
            {"autoscaler": {"enabled": False}, "workers": {"cpu": {"minReplicas": 0}}},
            "without the autoscaler nothing starts workers",
        ),
    ],
)
def test_values_that_do_not_fit_together_are_refused(values, said, render):
    with pytest.raises(RuntimeError, match=f"(?s)HelmRenderError: .*{re.escape(said)}"):
        render(values)


VARIABLES = {
    "AWS_SECRET_ACCESS_KEY": "x",
    "WANDB_KEY": "0123",
    "hf_auth": "x",
    "DATABASE_URL": "postgres://db",
    "PGPASS": "x",
    "GITHUB_PAT": "x",
    "OPENAI_KEY": "x",
    "MY_DB_PASSWORD": "hunter2",
    "MY_DB_PASSWORD_FILE": "/run/secrets/db",
    "DB_PASSWORD": "/run/secrets/db",
    "SERVICE_API_KEY": "x",
    "CI_JOB_TOKEN": "64charsofhex0123456789abcdef",
    "PROXY": "http://me:mine@proxy:3128",
    "MODEL": "hf_" + "aB3" * 11,
    "TOKENIZERS_PARALLELISM": "false",
    "MAX_TOKENS": "4096",
    "PAD_TOKEN": "<pad>",
    "SORT_KEY": "name",
    "RAY_AUTH_MODE": "token",
    "GOOGLE_APPLICATION_CREDENTIALS": "/var/run/key.json",
    "GIT_COMMIT": "d3ad7a2d3ad7a2d3ad7a2d3ad7a2d3ad7a2d3ad7",
    "ENDPOINT": "http://10.0.0.1:8000/v1",
}


@pytest.mark.parametrize("name", VARIABLES)
def test_the_chart_refuses_the_variables_that_a_spec_refuses(name, render):
    values = {"environment": {name: VARIABLES[name]}}
    if is_secret_variable(name, VARIABLES[name]):
        with pytest.raises(RuntimeError, match="HelmValuesError") as refused:
            render(values)
        assert len(VARIABLES[name]) < 6 or VARIABLES[name] not in str(refused.value)
    else:
        render(values)


@pytest.mark.parametrize(
    "job",
    [
        {"enabled": True, "spec": SPEC + "store: s3://key:hunter2@bucket/runs\n"},
        {"enabled": True, "spec": SPEC + f"# hf_{'aB3' * 11}\n"},
        {"enabled": True, "path": "/shared/a.yaml", "set": ["store=s3://key:hunter2@bucket/runs"]},
    ],
)
def test_a_secret_in_a_spec_is_refused_before_it_is_in_a_config_map(job, render):
    with pytest.raises(RuntimeError, match="HelmValuesError") as refused:
        render({"job": job})
    assert "hunter2" not in str(refused.value)
    assert "aB3" not in str(refused.value)


@pytest.mark.parametrize("name", ["1st", "2.5b-run", "a.b.c", "x" * 53, "0" * 53, "a-" * 26 + "a", "demo"])
@pytest.mark.parametrize("mode", ["job-cpu-monitors-extras", "cluster-cpu-monitors-plain"])
def test_names_are_dns_1035_labels_whatever_the_release_is_called(name, mode, render):
    """KubeRay makes a Service of the cluster's name, and Services begin with a letter and have no dots."""
    objects = render(MODES[mode], name=name)
    for document in objects.values():
        assert re.fullmatch("[a-z]([-a-z0-9]*[a-z0-9])?", document["metadata"]["name"])
        assert len(document["metadata"]["name"]) <= 47
        check(document)


def test_names_that_yaml_takes_for_something_else_stay_names(render):
    values = {
        "auth": {"secretName": "null"},
        "s3": {"secretName": "123"},
        "sharedVolume": {"claimName": "1e3", "mountPath": "/0"},
        "serviceAccount": {"name": "true"},
        "image": {"pullSecrets": ["0x1f"]},
        "networkPolicy": {"dashboardNamespaces": ["1"], "metricsNamespaces": ["on"]},
        "environment": {"on": "off", "NULL": "null"},
    }
    objects = render(values)
    for document in objects.values():
        check(document)
    for template in pods(objects):
        check({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod", **template["metadata"]}, **template})
    assert cluster_of(objects)["authOptions"]["secretName"] == "null"


def test_releases_with_the_same_beginning_have_names_of_their_own(render):
    one, other = (render({}, name="training-of-the-large-models-" + end) for end in ("one", "two"))
    assert not one.keys() & other.keys()


@pytest.mark.parametrize("job", [{}, {"job": JOB}])
def test_a_cluster_in_a_queue_of_kueue_has_its_full_size_and_no_autoscaler(job, render):
    """Kueue's webhook: a managed cluster should not use autoscaling, and its groups are counted by `replicas`."""
    cluster = cluster_of(render({**job, "labels": {"kueue.x-k8s.io/queue-name": "research"}, "workers": GPU}))
    assert cluster["enableInTreeAutoscaling"] is False
    assert "autoscalerOptions" not in cluster
    assert cluster["headGroupSpec"]["template"]["spec"]["automountServiceAccountToken"] is False
    sizes = [(group["replicas"], group["minReplicas"], group["maxReplicas"]) for group in cluster["workerGroupSpecs"]]
    assert sizes == [(4, 4, 4), (2, 2, 2)]
    without = cluster_of(render(job))
    assert without["enableInTreeAutoscaling"] is True
    assert [group["replicas"] for group in without["workerGroupSpecs"]] == [1]


@pytest.mark.parametrize(
    ("endpoint", "ports"),
    [
        ("", [443, 6443]),
        ("https://s3.example.org", [443, 6443]),
        ("http://minio:9000", [443, 6443, 9000]),
        ("https://minio.storage.svc:9443/", [443, 6443, 9443]),
        ("http://minio", [443, 6443, 80]),
        ("http://[fd00::1]:9000", [443, 6443, 9000]),
    ],
)
def test_the_port_of_the_s3_endpoint_may_be_reached(endpoint, ports, render):
    policy = render({"s3": {"endpoint": endpoint}})["NetworkPolicy/demo"]
    check(policy)
    assert [rule["port"] for rule in policy["spec"]["egress"][1]["ports"]] == [53, 53, *ports]


def test_large_numbers_are_written_out(helm):
    """Helm reads every number of a values file as floating point, and prints a large one as 1e+09."""
    large = 1_000_000_000
    tolerations = [{"key": "a", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": float(large)}]
    group = {"tolerations": tolerations, "cpus": 2_500_000.0, "maxReplicas": float(large), "minReplicas": 1e7}
    values = {
        "job": {**JOB, "deadlineSeconds": float(large), "keepSeconds": float(large), "retries": float(large)},
        "workers": {"cpu": group, "gpu": {**GPU["gpu"], **group, "gpus": 1e8}},
        "head": {"cpus": 1e7, "tolerations": tolerations},
        "autoscaler": {"idleTimeoutSeconds": float(large)},
    }
    files = helm("render", "helm/poise", values, "demo")
    numbers = [line for text in files.values() for line in text.splitlines() if re.search(r"\de\+?\d", line)]
    assert not [line for line in numbers if "sha" not in line and "digest" not in line]
    (job,) = (yaml.safe_load(text) for file, text in files.items() if file.endswith("rayjob.yaml"))
    assert job["spec"]["activeDeadlineSeconds"] == large
    (cpu, gpu) = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert (cpu["maxReplicas"], cpu["minReplicas"]) == (large, 10_000_000)
    assert cpu["template"]["spec"]["tolerations"][0]["tolerationSeconds"] == large
    limits = gpu["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert (limits["cpu"], limits["nvidia.com/gpu"]) == ("2500000", "100000000")
    check(job)


def test_half_a_core_stays_half_a_core(render):
    cluster = cluster_of(render({"head": {"cpus": 0.5}}))
    assert cluster["headGroupSpec"]["template"]["spec"]["containers"][0]["resources"]["limits"]["cpu"] == "0.5"


def described(schema: dict[str, Any], path: str = "values") -> Iterator[str]:
    """Keys without a description, and objects that take unknown keys without saying of which type."""
    if "description" not in schema:
        yield f"{path}: no description"
    if schema.get("type") == "object" and "additionalProperties" not in schema and path != "values.global":
        yield f"{path}: open"
    for name, inner in schema.get("properties", {}).items():
        yield from described(inner, f"{path}.{name}")


def test_the_schema_is_closed_describes_every_key_and_knows_every_default():
    schema = json.loads((CHART / "values.schema.json").read_text())
    assert not list(described(schema))
    assert not Draft202012Validator.check_schema(schema)
    defaults = yaml.safe_load((CHART / "values.yaml").read_text())

    def missing(values: dict[str, Any], known: dict[str, Any], path: str) -> Iterator[str]:
        for name, inner in known.get("properties", {}).items():
            if name not in values and name not in ("global", "image"):
                yield f"{path}.{name}"
            elif isinstance(values.get(name), dict):
                yield from missing(values[name], inner, f"{path}.{name}")

    assert not list(missing(defaults, schema, "values"))


def test_head_and_workers_are_what_poise_needs(render):
    cluster = cluster_of(render({"workers": GPU}))
    head, (cpu, gpu) = cluster["headGroupSpec"], cluster["workerGroupSpecs"]
    assert head["rayStartParams"]["num-cpus"] == "0"
    assert cluster["authOptions"] == {"mode": "token"}
    container = gpu["template"]["spec"]["containers"][0]
    assert (container["image"], container["resources"]["limits"]["nvidia.com/gpu"]) == ("poise:0.1.0-gpu", "1")
    assert gpu["template"]["spec"]["tolerations"][0]["key"] == "nvidia.com/gpu"
    assert "nvidia.com/gpu" not in cpu["template"]["spec"]["containers"][0]["resources"]["limits"]
    for template in (head["template"], cpu["template"], gpu["template"]):
        (container,) = template["spec"]["containers"]
        assert {"name": "shm", "mountPath": "/dev/shm"} in container["volumeMounts"]
        environment = {variable["name"]: variable["value"] for variable in container["env"]}
        assert environment.items() <= RAY_DEFAULTS.items()
        assert {"RAY_worker_niceness", "RAY_USAGE_STATS_ENABLED"} == environment.keys()


def test_the_job_runs_its_spec(tmp_path, render):
    objects = render({"job": JOB})
    job = objects["RayJob/demo-run"]["spec"]
    assert job["entrypoint"] == (
        "poise run /etc/poise/spec.yaml --metrics-port 9464"
        " --set store=s3://bucket/runs --set common.digits.train.epochs=2"
    )
    (tmp_path / "spec.yaml").write_text(objects["ConfigMap/demo-spec"]["data"]["spec.yaml"])
    assert (tmp_path / "spec.yaml").read_text() == SPEC
    assert load(tmp_path / "spec.yaml", KINDS, JOB["set"]).store == "s3://bucket/runs"
    head = job["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    assert {"name": "spec", "configMap": {"name": "demo-spec"}} in head["volumes"]
    in_image = render({"job": {"enabled": True, "path": "/shared/a.yaml"}})
    assert "poise run /shared/a.yaml " in in_image["RayJob/demo-run"]["spec"]["entrypoint"]
    assert "ConfigMap/demo-spec" not in in_image


def test_the_settings_of_the_guide(monkeypatch, render, helm):
    """Its `helm install` lines, read by Helm's own parser of --set and --set-file."""
    monkeypatch.chdir(ROOT)
    lines = [shlex.split(line) for line in (ROOT / "docs/cluster.md").read_text().splitlines() if line[:5] == "helm "]
    kinds = []
    for _helm, _install, name, chart, *options in lines:
        assert chart == "helm/poise"
        values: dict[str, Any] = {}
        for option, expression in zip(options[::2], options[1::2], strict=True):
            for section, inner in helm("parse", option, expression).items():
                values.setdefault(section, {}).update(inner)
        objects = render(values, name=name)
        kinds += [document["kind"] for document in objects.values() if document["apiVersion"] == "ray.io/v1"]
        if kinds[-1] == "RayJob":
            assert objects[f"ConfigMap/{name}-spec"]["data"]["spec.yaml"] == SPEC
            assert "--set store=s3://bucket/runs" in objects[f"RayJob/{name}-run"]["spec"]["entrypoint"]
        else:
            assert [group["groupName"] for group in cluster_of(objects)["workerGroupSpecs"]] == ["cpu", "gpu"]
    assert kinds == ["RayCluster", "RayJob"]


def test_keys_come_from_a_secret_or_a_role_and_are_nowhere_else(render):
    objects = render({**EXTRAS, "workers": GPU})
    for template in (cluster_of(objects)["headGroupSpec"], *cluster_of(objects)["workerGroupSpecs"]):
        container = template["template"]["spec"]["containers"][0]
        assert container["envFrom"] == [{"secretRef": {"name": "s3-keys"}}]
        assert template["template"]["spec"]["serviceAccountName"] == "demo"
    assert objects["ServiceAccount/demo"]["metadata"]["annotations"]["eks.amazonaws.com/role-arn"].endswith("poise")
    assert "ACCESS_KEY" not in yaml.safe_dump(objects)


def test_policies_select_the_pods_that_there_are(render):
    objects = render({"job": JOB, "monitoring": {"enabled": True}})
    policy, budget = objects["NetworkPolicy/demo"]["spec"], objects["PodDisruptionBudget/demo-head"]["spec"]
    monitor = objects["PodMonitor/demo"]["spec"]
    for template in pods(objects):
        labels = template["metadata"]["labels"].items()
        assert policy["podSelector"]["matchLabels"].items() <= labels
        assert monitor["selector"]["matchLabels"].items() <= labels
    assert budget["selector"]["matchLabels"] == {**policy["podSelector"]["matchLabels"], "ray.io/node-type": "head"}
    ports = {port["name"] for template in pods(objects) for port in template["spec"]["containers"][0].get("ports", [])}
    assert {endpoint["port"] for endpoint in monitor["podMetricsEndpoints"]} <= ports


def test_a_long_name_leaves_room_for_what_the_operator_appends(render):
    for values in ({}, {"job": {**JOB, "name": "x" * 16}}):
        for document in render(values, name="r" * 53).values():
            assert len(document["metadata"]["name"]) <= 47
            check(document)


def test_versions_are_those_of_the_project():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needs = project["optional-dependencies"]["ray"]
    (ray,) = (need.partition("==")[2] for need in needs if need.startswith("ray["))
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    assert values["rayVersion"] == ray
    import poise

    assert yaml.safe_load((CHART / "Chart.yaml").read_text())["appVersion"] == poise.__version__


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({}, ["raycluster demo", "get secret demo ", "store=s3://BUCKET/runs"]),
        ({"sharedVolume": {"claimName": "c"}}, ["store=/shared/runs"]),
        ({"job": JOB}, ["rayjob demo-run", "runs /etc/poise/spec.yaml"]),
    ],
)
def test_the_notes_say_what_to_do_next(values, said, helm):
    notes = helm("render", "helm/poise", values, "demo")["poise/templates/NOTES.txt"]
    assert all(words in notes for words in said), notes


def test_the_chart_can_be_packed(tmp_path, helm):
    assert {"files/alerts.yaml", "files/dashboard.json"} <= set(helm("packed", "helm/poise", str(tmp_path)))
