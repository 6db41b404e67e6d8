"""What schemas do not see: names that one file uses and another declares."""

import os
import re
import stat
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import REGISTRY

import headway.metrics  # noqa: F401  # declares what the registry holds
from headway.settings import Settings, load, variable

ROOT = Path(__file__).parents[2]
K8S = ROOT / "deploy/k8s"
VARIABLES = {variable(name) + form for name in Settings.model_fields for form in ("", "_FILE")}
UNITS = {"": 1, "m": 1e-3, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "k": 1e3, "M": 1e6, "G": 1e9}
NAME = "app.kubernetes.io/name"


class Overlay:
    """The objects that a kustomization brings in, patches apart, and the names of what it generates."""

    def __init__(self, folder: Path) -> None:
        self.objects: list[dict[str, Any]] = []
        self.generated: dict[str, set[str]] = {"ConfigMap": set(), "Secret": set()}
        self.environment: dict[str, str] = {}
        self._add(folder)

    def _add(self, folder: Path) -> None:
        kustomization = yaml.safe_load((folder / "kustomization.yaml").read_text())
        for resource in kustomization["resources"]:
            path = folder / resource
            if path.is_dir():
                self._add(path)
            else:
                self.objects += [item for item in yaml.safe_load_all(path.read_text()) if item]
        for kind in ("ConfigMap", "Secret"):
            for generator in kustomization.get(f"{kind[0].lower()}{kind[1:]}Generator", ()):
                self.generated[kind].add(generator["name"])
                self.environment |= dict(item.split("=", 1) for item in generator.get("literals", ()))

    def of(self, *kinds: str) -> list[dict[str, Any]]:
        return [item for item in self.objects if item["kind"] in kinds]

    @property
    def templates(self) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        """Each workload with its pod template."""
        return [(item, item["spec"]["template"]) for item in self.of("Deployment", "StatefulSet", "Job")]


@pytest.fixture(params=["dev", "production"])
def overlay(request: pytest.FixtureRequest) -> Overlay:
    return Overlay(K8S / "overlays" / request.param)


def quantity(text: object) -> float:
    number, unit = re.fullmatch(r"([0-9.]+)([A-Za-z]*)", str(text)).groups()  # type: ignore[union-attr]
    return float(number) * UNITS[unit]


def selects(selector: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    wanted = all(labels.get(key) == value for key, value in selector.get("matchLabels", {}).items())
    return wanted and all(
        rule["operator"] == "In" and labels.get(rule["key"]) in rule["values"]
        for rule in selector.get("matchExpressions", ())
    )


def ports(template: Mapping[str, Any]) -> dict[str, int]:
    return {
        port["name"]: port["containerPort"]
        for container in template["spec"]["containers"]
        for port in container.get("ports", ())
    }


def test_selectors_match_the_pods_they_are_for(overlay: Overlay) -> None:
    pods = [template["metadata"]["labels"] for _, template in overlay.templates]
    for workload, template in overlay.templates:
        if "selector" in workload["spec"]:
            assert selects(workload["spec"]["selector"], template["metadata"]["labels"]), workload["metadata"]
        for spread in template["spec"].get("topologySpreadConstraints", ()):
            assert selects(spread["labelSelector"], template["metadata"]["labels"]), workload["metadata"]
    for service in overlay.of("Service"):
        assert any(selects({"matchLabels": service["spec"]["selector"]}, pod) for pod in pods), service["metadata"]
    for item in overlay.of("PodDisruptionBudget"):
        assert any(selects(item["spec"]["selector"], pod) for pod in pods), item["metadata"]
    for item in overlay.of("NetworkPolicy"):
        assert any(selects(item["spec"]["podSelector"], pod) for pod in pods), item["metadata"]


def test_named_ports_exist_where_they_are_used(overlay: Overlay) -> None:
    declared = {template["metadata"]["labels"][NAME]: ports(template) for _, template in overlay.templates}
    for _, template in overlay.templates:
        for container in template["spec"]["containers"]:
            for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
                if "httpGet" in container.get(probe, {}):
                    assert container[probe]["httpGet"]["port"] in ports(template)
        annotations = template["metadata"].get("annotations", {})
        if "prometheus.io/port" in annotations:
            assert int(annotations["prometheus.io/port"]) == ports(template)["ops"]
    for service in overlay.of("Service"):
        for port in service["spec"]["ports"]:
            assert port["targetPort"] in declared[service["spec"]["selector"][NAME]]
    for policy in overlay.of("NetworkPolicy"):
        chosen = [named for app, named in declared.items() if selects(policy["spec"]["podSelector"], {NAME: app})]
        for rule in policy["spec"].get("ingress", ()):
            for port in rule.get("ports", ()):
                assert all(port["port"] in named for named in chosen), policy["metadata"]


def test_what_pods_refer_to_exists(overlay: Overlay) -> None:
    claims = {item["metadata"]["name"] for item in overlay.of("PersistentVolumeClaim")}
    for workload, template in overlay.templates:
        own = {item["metadata"]["name"] for item in workload["spec"].get("volumeClaimTemplates", ())}
        volumes = {volume["name"]: volume for volume in template["spec"].get("volumes", ())}
        for container in template["spec"]["containers"]:
            for source in container.get("envFrom", ()):
                for key, kind in (("configMapRef", "ConfigMap"), ("secretRef", "Secret")):
                    if key in source:
                        assert source[key]["name"] in overlay.generated[kind]
            mounted = {mount["name"] for mount in container.get("volumeMounts", ())}
            assert mounted <= volumes.keys() | own
        for volume in volumes.values():
            if "persistentVolumeClaim" in volume:
                assert volume["persistentVolumeClaim"]["claimName"] in claims
            if "configMap" in volume:
                assert volume["configMap"]["name"] in overlay.generated["ConfigMap"]


def test_pods_are_restricted_and_ask_for_no_more_than_their_limits(overlay: Overlay) -> None:
    for _, template in overlay.templates:
        spec = template["spec"]
        assert spec["automountServiceAccountToken"] is False
        assert spec["enableServiceLinks"] is False
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in spec["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            asked, limit = container["resources"]["requests"], container["resources"]["limits"]
            assert {"cpu", "memory"} <= asked.keys()
            assert "memory" in limit
            for name in asked.keys() & limit.keys():
                assert quantity(asked[name]) <= quantity(limit[name])


def test_pods_outlive_the_drain(overlay: Overlay) -> None:
    drain = float(overlay.environment["HEADWAY_DRAIN"])
    for item, template in overlay.templates:
        if item["kind"] == "Deployment":
            lifecycle = template["spec"]["containers"][0].get("lifecycle", {})
            sleep = lifecycle.get("preStop", {}).get("sleep", {}).get("seconds", 0)
            assert template["spec"]["terminationGracePeriodSeconds"] > drain + sleep


def test_every_manifest_is_listed() -> None:
    for kustomization in K8S.rglob("kustomization.yaml"):
        content = yaml.safe_load(kustomization.read_text())
        listed = {*content["resources"], *(patch["path"] for patch in content.get("patches", ()) if "path" in patch)}
        there = {path.name for path in kustomization.parent.glob("*.yaml")} - {"kustomization.yaml"}
        assert there == {name for name in listed if name.endswith(".yaml")}
        for generator in content.get("configMapGenerator", ()):
            for name in generator.get("files", ()):
                assert (kustomization.parent / name).is_file()


def test_every_variable_is_a_setting() -> None:
    files = [ROOT / "docker-compose.yml", ROOT / "Dockerfile"]
    files += [path for path in K8S.rglob("*") if path.is_file() and path.suffix in {".yaml", ".sh", ".example"}]
    for path in files:
        assert set(re.findall(r"\bHEADWAY_[A-Z_]+", path.read_text())) <= VARIABLES, path


def parse(env_file: Path) -> dict[str, str]:
    return dict(line.split("=", 1) for line in env_file.read_text().splitlines())


def test_the_dev_secrets_are_settings_that_load(tmp_path: Path) -> None:
    script = tmp_path / "secrets.sh"
    script.write_text((K8S / "overlays/dev/secrets.sh").read_text())
    subprocess.run(["sh", script], check=True)
    first = parse(tmp_path / "headway.env")
    subprocess.run(["sh", script], check=True)
    assert parse(tmp_path / "headway.env") == first
    assert stat.S_IMODE((tmp_path / "headway.env").stat().st_mode) == 0o600
    load(first)
    passwords = parse(tmp_path / "postgres.env")
    assert passwords["DATABASE_PASSWORD"] in first["HEADWAY_DATABASE_URL"]
    assert passwords["SOURCE_PASSWORD"] in first["HEADWAY_SOURCES"]


def test_the_production_example_is_settings_that_load() -> None:
    load(parse(K8S / "overlays/production/headway.env.example"))


def compose() -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    return content


def test_compose_environment_loads_with_the_generated_secrets(tmp_path: Path) -> None:
    env_file = tmp_path / ".env"
    subprocess.run(["sh", ROOT / "deploy/environment.sh", env_file], check=True, env={"PATH": os.environ["PATH"]})
    assert stat.S_IMODE(env_file.stat().st_mode) == 0o600
    given = parse(env_file)
    assert len(set(given.values())) == len(given)

    def interpolated(text: str) -> str:
        return re.sub(
            r"\$\{(\w+)(?::([-?])([^}]*))?\}",
            lambda found: given.get(found[1]) or ("" if found[2] == "?" else found[3] or ""),
            text,
        )

    for service in ("web", "worker", "migrate"):
        environment = {key: interpolated(value) for key, value in compose()["services"][service]["environment"].items()}
        settings = load(environment)
        assert given["DATABASE_PASSWORD"] in settings.database_url.get_secret_value()


def test_existing_values_survive_environment_sh(tmp_path: Path) -> None:
    env_file = tmp_path / ".env"
    env_file.write_text("HEADWAY_PORT=8123\nPOSTGRES_PASSWORD=kept\n")
    subprocess.run(["sh", ROOT / "deploy/environment.sh", env_file], check=True)
    assert parse(env_file)["HEADWAY_PORT"] == "8123"
    assert parse(env_file)["POSTGRES_PASSWORD"] == "kept"
    assert len(parse(env_file)["HEADWAY_KEY_PEPPER"]) == 64


def test_compose_publishes_on_loopback_only_and_hardens_every_service() -> None:
    for name, service in compose()["services"].items():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ())), name
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name


def test_compose_waits_longer_than_the_drain() -> None:
    services = compose()["services"]
    for name in ("web", "worker"):
        drain = float(services[name]["environment"]["HEADWAY_DRAIN"])
        assert float(services[name]["stop_grace_period"].removesuffix("s")) > drain


def rules() -> Iterator[dict[str, Any]]:
    for group in yaml.safe_load((ROOT / "deploy/prometheus/alerts.yml").read_text())["groups"]:
        yield from group["rules"]


def test_alerts_name_metrics_that_exist() -> None:
    exposed = {f"{family.name}{end}" for family in REGISTRY.collect() for end in ("", "_total", "_bucket", "_count")}
    for rule in rules():
        used = set(re.findall(r"\bheadway_\w+", rule["expr"] + rule["annotations"]["description"]))
        assert used <= exposed, rule["alert"]


def test_prometheus_scrapes_the_services_and_ports_of_compose() -> None:
    config = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text())
    scraped = {item["names"][0]: item["port"] for job in config["scrape_configs"] for item in job["dns_sd_configs"]}
    assert scraped == {"web": 9000, "worker": 9000}
    assert "HEADWAY_OPS_PORT=9000" in (ROOT / "Dockerfile").read_text()
