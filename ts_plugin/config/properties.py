"""The properties that TorchServe knows, and which values of them keep it from starting.

Source: org.pytorch.serve.util.ConfigManager, Connector, ServerGroups; org.pytorch.serve.ModelServer (startRESTserver,
startGRPCServer); tests/test_verdict.py asks these classes themselves.
"""

from __future__ import annotations

import difflib
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from ts_plugin.config.gson import java_int


@dataclass(frozen=True, slots=True)
class Integer:
    """Which numbers a property may have; ``sample`` is one that is always good.

    The start does not read it while the switch ``unless`` is on, nor what is read ``later``: with a model, or after.
    """

    lowest: int = -(2**63)
    highest: int = 2**63 - 1
    bits: int = 32
    sample: int = 1
    unless: str = ""
    later: bool = False

    def problem(self, text: str) -> str:
        """Return why the value does not do, empty if it does."""
        number = java_int(text, self.bits)
        if number is None:
            return f"is no whole number that Java reads{' (a blank at its end)' if text != text.rstrip() else ''}"
        if number < self.lowest:
            return f"is below {self.lowest}"
        return f"is above {self.highest}" if number > self.highest else ""


AGE, GRACE = Integer(1, bits=64, sample=60000), Integer(0, bits=64, sample=60000)
INTEGERS: Final[Mapping[str, Integer]] = {
    "default_workers_per_model": Integer(unless="debug"),
    "default_response_timeout": Integer(sample=120, later=True),
    "default_startup_timeout": Integer(sample=120, later=True),
    "unregister_model_timeout": Integer(sample=120, later=True),
    "number_of_netty_threads": Integer(0, sample=4),
    "netty_client_threads": Integer(0, sample=4),
    "job_queue_size": Integer(1, sample=100, later=True),
    "number_of_gpu": Integer(sample=0),
    "max_request_size": Integer(0, sample=6553500),
    "max_response_size": Integer(0, sample=6553500, later=True),
    "initial_worker_port": Integer(sample=9000),
    "initial_distribution_port": Integer(sample=29500),
    "io_ratio": Integer(1, 100, sample=50, unless="use_native_io"),
    "metric_time_interval": Integer(1, sample=60, unless="disable_system_metrics"),
    "grpc_inference_port": Integer(0, 65535, sample=7070),
    "grpc_management_port": Integer(0, 65535, sample=7071),
    "grpc_inference_max_connection_age_ms": AGE,
    "grpc_management_max_connection_age_ms": AGE,
    "grpc_inference_max_connection_age_grace_ms": GRACE,
    "grpc_management_max_connection_age_grace_ms": GRACE,
}

SWITCHES: Final[Mapping[str, bool]] = {  # and what they are where the file does not say
    "debug": False,
    "model_metrics_auto_detect": False,
    "disable_system_metrics": False,
    "ipex_enable": False,
    "cpu_launcher_enable": False,
    "ipex_gpu_enable": False,
    "async_logging": False,
    "decode_input_request": True,
    "limit_max_image_pixels": True,
    "prefer_direct_buffer": False,
    "install_py_dep_per_model": False,
    "enable_metrics_api": True,
    "enable_grpc_ssl": False,
    "ts_open_inference_protocol": False,
    "disable_token_authorization": False,
    "enable_model_api": False,
    "use_native_io": True,
    "enable_envvars_config": False,
    "use_env_allowed_urls": False,
}
ADDRESSES: Final[Mapping[str, int]] = {
    "inference_address": 8080,
    "management_address": 8081,
    "metrics_address": 8082,
}
_TEXTS = """
    allowed_urls blacklist_env_vars certificate_file cors_allowed_headers cors_allowed_methods cors_allowed_origin
    cpp_log_config cpu_launcher_args default_service_handler grpc_inference_address grpc_management_address keystore
    keystore_pass keystore_type load_models metrics_config metrics_mode model_server_home model_snapshot model_store
    models plugins_path private_key_file python service_envelope system_metrics_cmd token_expiration_min
    ts_header_key_sequence_end ts_header_key_sequence_id ts_header_key_sequence_start tsConfigFile version vmargs
    workflow_store
""".split()  # noqa: SIM905
KNOWN: Final = frozenset((*_TEXTS, *INTEGERS, *SWITCHES, *ADDRESSES))

# Of these an environment variable TS_... may be set, named like the property but for the three that are written out.
_NO_VARIABLE = "use_native_io io_ratio metric_time_interval enable_envvars_config use_env_allowed_urls model_snapshot"
_NO_VARIABLE += " models version system_metrics_cmd python tsConfigFile plugins_path vmargs token_expiration_min"
VARIABLES: Final[Mapping[str, str]] = {
    f"TS_{name.upper()}": name for name in KNOWN - set(_NO_VARIABLE.split()) if not name.startswith("ts_")
} | {
    "TS_TOKEN_EXPIRATION_TIME_MIN": "token_expiration_min",
    "TS_OPEN_INFERENCE_PROTOCOL": "ts_open_inference_protocol",
    "TS_HEADER_KEY_SEQUENCE_ID": "ts_header_key_sequence_id",
    "TS_HEADER_KEY_SEQUENCE_START": "ts_header_key_sequence_start",
    "TS_HEADER_KEY_SEQUENCE_END": "ts_header_key_sequence_end",
}

ADDRESS = re.compile(r"(?:(https?)://([^:^/]+)(?::([0-9]+))?)|unix:(/.*)", re.IGNORECASE | re.ASCII)
MOST_MINUTES = 10**12  # until a token expires; Java's clock ends there


@dataclass(frozen=True, slots=True)
class Fault:
    """What is wrong with a property, and the ``change`` that cures it."""

    what: str
    change: str


@dataclass(frozen=True, slots=True)
class Address:
    """Where the server listens: a UNIX socket's ``path``, or ``host`` and ``port``, 0 for any that is free."""

    host: str = ""
    port: int = 0
    tls: bool = False
    path: str = ""


def on(properties: Mapping[str, str], name: str) -> bool:
    """Tell whether a switch is on; like Java's parseBoolean it allows no blank around ``true``."""
    return properties[name].lower() == "true" if name in properties else SWITCHES[name]


def address(name: str, text: str) -> Address | None:
    """Return what TorchServe reads, None where it throws; it takes no IPv6 address, in brackets or not."""
    match = ADDRESS.fullmatch(text)
    if match is None:
        return None
    scheme, host, port, path = match.groups()
    if path:
        return Address(path=path)
    tls = scheme.lower() == "https"
    # Without a port it is not the default one of the property.
    others = {"management_address": 8444 if tls else 8081, "metrics_address": 8445 if tls else 8082}
    number = java_int(port) if port else others.get(name, 443 if tls else 80)
    return None if number is None or number >= 65535 else Address(host, number, tls)


def pattern_problem(text: str) -> str:
    """Return why a regular expression is none, empty if it is one; in Java's those that Python lacks are put aside."""
    text = re.sub(r"\\Q.*?(\\E|$)", "x", text)
    text = re.sub(r"\\[pP](\w|\{\w+\})|\\[hHRXvV]", ".", text).replace("(?<", "(?P<").replace("(?P<=", "(?<=")
    text = text.replace("(?P<!", "(?<!").replace("\\z", "\\Z")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            re.compile(text)
    except re.error as error:
        return str(error)
    return ""


def nearest(name: str) -> str | None:
    """Return the known property that an unknown ``name`` is probably meant to be."""
    close = difflib.get_close_matches(name.replace("-", "_").lower(), KNOWN, n=1, cutoff=0.8)
    return close[0] if close else None


def refused(properties: Mapping[str, str]) -> Iterator[Fault]:
    """Yield what ends the start of the server whatever models it loads; what is not there has its default."""
    for name, integer in INTEGERS.items():
        unread = integer.later or (integer.unless and on(properties, integer.unless))
        if name in properties and not unread and (problem := integer.problem(properties[name])):
            yield Fault(f"{name}={properties[name]!r} {problem}", f"{name}={integer.sample}")
    yield from _addresses(properties)
    if problem := pattern_problem(properties.get("blacklist_env_vars", "")):
        text = properties["blacklist_env_vars"]
        yield Fault(f"blacklist_env_vars={text!r} is no regular expression: {problem}", "correct it")
    minutes = properties.get("token_expiration_min", "60")
    if not on(properties, "disable_token_authorization") and _is_endless(minutes):
        yield Fault(f"token_expiration_min={minutes!r} is more than Java's clock can count", "token_expiration_min=60")


def _is_endless(minutes: str) -> bool:
    try:
        return float(minutes) > MOST_MINUTES
    except ValueError:
        return False  # TorchServe takes 60 then


def listening(properties: Mapping[str, str]) -> dict[str, Address]:
    """Return where the server listens, by the property that says so: that of the port for gRPC.

    An address that TorchServe cannot read is left out, and one of two that are equal: one server then has both APIs.
    """
    places: dict[str, Address] = {}
    for name, port in ADDRESSES.items():
        found = address(name, properties.get(name, f"http://127.0.0.1:{port}"))
        if found and (name != "metrics_address" or on(properties, "enable_metrics_api")):
            places[name] = found
    both = [places.get(name) for name in ("inference_address", "management_address")]
    if len({(one.path, one.host, one.port) for one in both if one}) == 1:
        places.pop("management_address", None)
    for kind in ("inference", "management"):
        number = java_int(properties.get(f"grpc_{kind}_port", str(INTEGERS[f"grpc_{kind}_port"].sample)))
        places[f"grpc_{kind}_port"] = Address(properties.get(f"grpc_{kind}_address", "127.0.0.1"), number or 0)
    return places


def _addresses(properties: Mapping[str, str]) -> Iterator[Fault]:
    for name, port in ADDRESSES.items():
        change = f"{name}=http://127.0.0.1:{port}"
        text = properties.get(name, "http://127.0.0.1")
        found = address(name, text)
        if found is None:
            yield Fault(f"{name}={text!r} is no address that TorchServe reads", change)
        elif found.path and not on(properties, "use_native_io"):
            yield Fault(f"{name}={text!r} needs use_native_io=true, for UNIX sockets", change)
    places, pair = listening(properties), {"private_key_file", "certificate_file"} <= properties.keys()
    for name, place in places.items():
        if place.tls and not pair and "keystore" not in properties:
            yield Fault(
                f"{name}={properties[name]!r} needs a key, and Java from 16 on lets TorchServe make none",
                "keystore=FILE, or private_key_file=FILE and certificate_file=FILE",
            )
    if on(properties, "enable_grpc_ssl") and not pair:
        yield Fault("enable_grpc_ssl=true without a key", "private_key_file=FILE and certificate_file=FILE")
    yield from _clashes(places)


def _clashes(places: Mapping[str, Address]) -> Iterator[Fault]:
    """Yield those that want a port which one before them has."""
    taken: dict[tuple[str, int], str] = {}
    for name, one in places.items():
        host = {"localhost": "127.0.0.1", "": "127.0.0.1"}.get(one.host.lower(), one.host)
        for (other, port), holder in taken.items():
            if one.port == port != 0 and (host == other or "0.0.0.0" in (host, other)):
                yield Fault(f"{name} wants port {port}, which {holder} has", f"another port for {name}")
                break
        if one.port:
            taken.setdefault((host, one.port), name)
