"""Room 3, Settings."""

import argparse
import dataclasses
import ipaddress
import re
from pathlib import Path

import pytest
import yaml

import shimmercat
from shimmercat import (
    OPTIONS,
    ConfigurationError,
    ConsultantSettings,
    DomainSettings,
    NetworkAddress,
    RemoteRoot,
    RewriteRule,
    Tweaks,
    load_settings,
    tweaks_text,
)

CONF = Path(__file__).parent.parent.parent / "conf"
SMALLEST = "shimmercat-devlove: {domains: {a.test: {root-dir: www}}}"


@pytest.fixture
def site(tmp_path):
    """A folder with what the configurations of these tests name."""
    for name in ("www", "client-bin", "site", "public", "views", "views-dir"):
        (tmp_path / name).mkdir()
    (tmp_path / "ca.pem").write_text("")
    (tmp_path / "build" / "dirhtml").mkdir(parents=True)
    return tmp_path


@pytest.fixture
def load(site):
    """Settings of a devlove.yaml and a tweaks.yaml, as a function."""
    def of(devlove=SMALLEST, tweaks=None, **flags):
        scratch = site / ".shimmercat.loves.devs"
        (site / "devlove.yaml").write_text(devlove)
        if tweaks is not None:
            scratch.mkdir(exist_ok=True)
            (scratch / "tweaks.yaml").write_text(tweaks)
        flags = argparse.Namespace(
            mode="devlove", working_dir=str(site), **flags)
        return load_settings(flags, RewriteRule.parse)
    return of


@pytest.fixture
def refuse(load, site):
    """Mistakes of a configuration, without their folder, as a function."""
    def of(*files, **flags):
        with pytest.raises(ConfigurationError) as caught:
            load(*files, **flags)
        assert caught.value.exit_code == 78
        return [line.removeprefix(f"{site}/")
                for line in str(caught.value).splitlines()]
    return of


def electric(*lines, name="elec a.test"):
    """A devlove.yaml with one domain; its keys begin in line 4."""
    return "\n".join(["shimmercat-devlove:", "  domains:", f"    {name}:",
                      *(f"      {line}" for line in lines)])


# The devlove.yaml files of public example projects, as they are.
@pytest.mark.parametrize(("text", "expected"), [
    ("---\nshimmercat-devlove:\n    domains:\n          www.httpdos.com:\n"
     "            root-dir: www\n          api.httpdos.com:\n"
     "            port: 8080",
     {"www.httpdos.com": "elec", "api.httpdos.com": "api"}),
    ("---\nshimmercat-devlove:\n    domains:\n"
     "        www.express-website.mine:\n            root-dir: client-bin\n"
     "        myapi.express-website.mine:\n            port: 8000\n",
     {"www.express-website.mine": "elec",
      "myapi.express-website.mine": "api"}),
    ("shimmercat-devlove:\n    domains:\n        www.example.com:\n"
     "           root-dir: site\n", {"www.example.com": "elec"}),
    ("---\nshimmercat-devlove:\n    domains:\n"
     "        www.cache-digests-report.org:\n"
     "            root-dir: build/dirhtml\n",
     {"www.cache-digests-report.org": "elec"}),
    ('shimmercat-devlove:\n    domains:\n        api1.mysite.com:\n'
     '            port: "8080"\n        www.mysite.com:\n'
     '            root-dir: www\n',
     {"api1.mysite.com": "api", "www.mysite.com": "elec"}),
])
def test_public_examples_load_unchanged(load, text, expected):
    domains = load(text).domains
    assert {name: domain.kind for name, domain in domains.items()} == expected


def test_an_old_entry_of_an_api_has_a_local_port(load):
    domain = load(electric("port: 8080", name="api.httpdos.com")).domains[
        "api.httpdos.com"]
    assert domain.consultants["api.httpdos.com"].connect_to == (
        NetworkAddress("inet", "127.0.0.1", 8080),)


def test_an_api_may_speak_what_consultants_do(load):
    domain = load(electric(
        "port: unix:///run/api.sock", "application-protocol: fastcgi",
        "document-root: /srv/api", "script-name: /index.php",
        name="api Api.test")).domains["api.test"]
    (consultant,) = domain.consultants.values()
    assert (consultant.name, consultant.application_protocol,
            consultant.document_root, consultant.script_name) == (
        "api.test", "fastcgi", "/srv/api", "/index.php")
    assert str(consultant.connect_to[0]) == "unix:///run/api.sock"


def test_a_domain_with_nothing_but_statics_has_all_defaults(load, site):
    domain = load(electric("root-dir: www")).domains["a.test"]
    assert domain == DomainSettings(
        "a.test", "elec", f"{site}/devlove.yaml:3",
        root_dir=site / "www", views_dir=site / "www")


def test_a_domain_with_all_keys_has_their_values(load, site):
    domain = load(electric(
        "root-dir: public", "views-dir: views", "cache-key: shared",
        "change-url: [/a -> /b, /*.x -> static /$1.y]",
        "changelist-settings: {tNew: 20, tOld: 7200.5}",
        "prob-accelerator-kicks-in: 0.5", "bot-protection-enabled: yes",
        "consultant: {connect-to: 8000}", "consultants:",
        "  shop: {connect-to: [':1', '[::1]:2'], verify: false,",
        "         application-protocol: https, ca-file: ca.pem,",
        "         use-host: shop.test, max-connections: 5,",
        "         first-byte-timeout: 1.5}",
        "  php: {connect-to: 'unix:///run/php.sock', document-root: /srv,",
        "        application-protocol: fastcgi, script-name: /i.php}",
        name="elec   WWW.A.test")).domains["www.a.test"]
    address = NetworkAddress.parse
    assert domain == DomainSettings(
        "www.a.test", "elec", f"{site}/devlove.yaml:3",
        root_dir=site / "public", views_dir=site / "views",
        cache_key="shared",
        change_url=("/a -> /b", "/*.x -> static /$1.y"),
        changelist_settings=(7200.5, 20), prob_accelerator_kicks_in=0.5,
        bot_protection_enabled=True, consultants={
            "default": ConsultantSettings("default", (address("8000"),)),
            "shop": ConsultantSettings(
                "shop", (address("1"), address("[::1]:2")), "https",
                "shop.test", site / "ca.pem", False, None, None, 5, 1.5),
            "php": ConsultantSettings(
                "php", (address("unix:///run/php.sock"),), "fastcgi",
                document_root="/srv", script_name="/i.php")})


@pytest.mark.parametrize(("lines", "remote"), [
    (["root-dir:", "  fetch-backend: http",
      "  http-port: lookup(files.bicycles.test):80",
      "  use-host: files.bicycles.test", "  path-prefix: /webroot"],
     RemoteRoot(None, "http", NetworkAddress("lookup", "files.bicycles.test",
                                             80),
                "files.bicycles.test", "/webroot")),
    (["root-dir: {use-consultant: origin}", "consultants:",
      "  origin: {connect-to: 443, application-protocol: https}"],
     RemoteRoot("origin")),
    (["root-dir: {use-consultant: default}", "consultant: {connect-to: 80}"],
     RemoteRoot("default")),
])
def test_statics_may_come_from_elsewhere(load, site, lines, remote):
    domain = load(electric(*lines, "views-dir: views")).domains["a.test"]
    assert (domain.root_dir, domain.remote_root) == (None, remote)
    assert domain.views_dir == site / "views"


@pytest.mark.parametrize(("line", "mistake"), [
    # spelling
    ("root-dri: www", "root-dri: unknown key, nearest known: root-dir"),
    ("Views-Dir: views", "Views-Dir: unknown key, nearest known: views-dir"),
    ("zzzzzzz: 1", "zzzzzzz: unknown key, expected root-dir, views-dir, "),
    ("? [a]\n      : 1", "unknown key, expected root-dir, "),
    ("<<: {root-dir: www}", "<<: unknown key"),
    # folders
    ("views-dir: nowhere", "views-dir: got 'nowhere', expected a readable"
     " folder at "),
    ("views-dir: ca.pem", "views-dir: got 'ca.pem', expected a readable"
     " folder at "),
    ("views-dir:", "views-dir: got nothing, expected a path"),
    ("views-dir: true", "views-dir: got 'true', expected a path"),
    ("views-dir: 2016", "views-dir: got '2016', expected a path"),
    ("views-dir: [www]", "views-dir: got a list, expected a path"),
    ('views-dir: "a\\0b"', "views-dir: got 'a\\x00b', expected a path"),
    # other values
    ("cache-key: ''", "cache-key: got nothing, expected ASCII text"),
    ("cache-key: naïve", "cache-key: got 'naïve', expected ASCII text"),
    ('cache-key: "a\\nb"', "cache-key: got 'a\\nb', expected ASCII text"),
    ("change-url: /a -> /b", "change-url: got '/a -> /b', expected a list"),
    ("change-url: [/a -> /b, /c]",
     "change-url > 2: got '/c', column 3: expected '->' after the pattern"),
    ("change-url: [{/a: /b}]", "change-url > 1: got keys, expected"),
    ("prob-accelerator-kicks-in: 1.5",
     "prob-accelerator-kicks-in: got '1.5', expected a number from 0 to 1"),
    ("prob-accelerator-kicks-in: -0.1", "got '-0.1', expected a number from"),
    ("prob-accelerator-kicks-in: .nan", "got '.nan', expected a number from"),
    ("prob-accelerator-kicks-in: .inf", "got '.inf', expected a number from"),
    ("bot-protection-enabled: 1", "got '1', expected true or false"),
    ("bot-protection-enabled: 'true'", "got 'true', expected true or false"),
    ("changelist-settings: {tOld: 5}",
     "changelist-settings: the key tNew is missing"),
    ("changelist-settings: {tOld: 5, tNew: 5}",
     "changelist-settings: got keys, expected a tNew less than tOld"),
    ("changelist-settings: {tOld: 5, tNew: 1, tnew: 1}",
     "changelist-settings > tnew: unknown key, nearest known: tNew"),
    ("changelist-settings: 7200", "got '7200', expected keys with values"),
    # consultants
    ("consultant: 8080", "consultant: got '8080', expected keys with values"),
    ("consultant: {}", "consultant: the key connect-to is missing"),
    ("consultant: {connect-to: []}", "connect-to: got nothing, expected an"),
    ("consultant: {connect-to: eighty}",
     "consultant > connect-to: got 'eighty', expected an address like"),
    ("consultant: {connect-to: 8080.5}", "got '8080.5', expected an address"),
    ("consultant: {connect-to: [1, 0]}",
     "consultant > connect-to > 2: got '0', expected an address like"),
    ("consultants: {shop: {connect-to: 1, verfy: no}}",
     "consultants > shop > verfy: unknown key, nearest known: verify"),
    ("consultants: {shop: {connect-to: 1, ca-file: www}}",
     "consultants > shop > ca-file: got 'www', expected a readable file"),
    ("consultants: {s: {connect-to: 1, application-protocol: ftp}}",
     "got 'ftp', expected http or https or fastcgi"),
    ("consultants: {s: {connect-to: 1, max-connections: 0}}",
     "got '0', expected a whole number from 1 to 10000"),
    ("consultants: {s: {connect-to: 1, first-byte-timeout: 0}}",
     "got '0', expected seconds from 0.1 to 86400"),
    ("consultants: [shop]", "consultants: got a list, expected keys"),
    # an API's key
    ("port: 80", "port: unknown key"),
])
def test_a_mistake_in_an_electric_domain_is_named(refuse, line, mistake):
    found = refuse(electric("root-dir: www", line))
    assert len(found) == 1
    place = "devlove.yaml:5: shimmercat-devlove > domains > elec a.test"
    assert found[0].startswith((place, place.replace(":5:", ":6:")))
    assert mistake in found[0]


@pytest.mark.parametrize(("root", "mistake"), [
    ("nowhere", "root-dir: got 'nowhere', expected a readable folder at"),
    ("{fetch-backend: ftp, http-port: 1}", "got 'ftp', expected http"),
    ("{fetch-backend: http}", "root-dir: the key http-port is missing"),
    ("{fetch-backend: http, http-port: 'socket-fd://3'}",
     "root-dir > http-port: got 'socket-fd://3', expected an address to"
     " connect to"),
    ("{use-consultant: shopp}",
     "root-dir: got the consultant 'shopp', expected shop"),
    ("{use-consultant: zzz}",
     "root-dir: got the consultant 'zzz', expected one of this domain"),
    ("{use-consultant: shop, use-host: x}", "use-host: unknown key"),
    ("{}", "root-dir: the key fetch-backend is missing"),
    ("[www]", "root-dir: got a list, expected a path"),
])
def test_a_mistake_in_root_dir_is_named(refuse, root, mistake):
    found = refuse(electric(
        f"root-dir: {root}", "views-dir: views",
        "consultants: {shop: {connect-to: 1}}"))
    assert mistake in found[0]
    assert found[0].startswith("devlove.yaml:4: ")


def test_a_remote_root_dir_needs_a_views_dir(refuse):
    assert refuse(electric(
        "root-dir: {use-consultant: default}",
        "consultant: {connect-to: 1}")) == [
            "devlove.yaml:3: shimmercat-devlove > domains > elec a.test:"
            " the key views-dir is missing: root-dir is remote"]


def test_a_default_consultant_is_given_once(refuse):
    assert "both consultant and consultants > default" in refuse(electric(
        "root-dir: www", "consultant: {connect-to: 1}",
        "consultants: {default: {connect-to: 2}}"))[0]


@pytest.mark.parametrize("name", [
    "elec -a.test", "elec a-.test", "elec a..test", "elec .test",
    "elec a.test.", "elec *.test", "elec bücher.test", "elec a_b.test",
    f"elec {'a' * 64}.test", f"elec {'a.' * 130}test", "elec a.test:443",
    '"elec "',
])
def test_what_is_no_domain_name_is_named(refuse, name):
    found = refuse(electric("root-dir: www", name=name))
    assert len(found) == 1
    assert "expected a domain name of ASCII letters" in found[0]
    assert found[0].startswith("devlove.yaml:3: ")


@pytest.mark.parametrize("name", [
    "localhost", "elec xn--bcher-kva.test", "A.TEST", "elec 127.0.0.1",
    f"elec {'a' * 63}.test",
])
def test_all_that_the_schema_allows_is_a_domain_name(load, name):
    domains = load(electric("root-dir: www", name=name)).domains
    assert list(domains) == [name.split()[-1].lower()]


@pytest.mark.parametrize(("text", "mistakes"), [
    ("", ["devlove.yaml: empty, expected the key shimmercat-devlove"]),
    ("# nothing\n---\n",
     ["devlove.yaml: got nothing, expected keys with values"]),
    ("[1]", ["devlove.yaml: got a list, expected keys with values"]),
    ("? [a, b]\n: 1", [
        "devlove.yaml: the key shimmercat-devlove is missing",
        "devlove.yaml:1: ? ...: unknown key, expected shimmercat-devlove"]),
    ("shimmercat: {}", [
        "devlove.yaml: the key shimmercat-devlove is missing",
        "devlove.yaml:1: shimmercat: unknown key, nearest known:"
        " shimmercat-devlove"]),
    ("shimmercat-devlove:", ["devlove.yaml:1: shimmercat-devlove: got"
                             " nothing, expected keys with values"]),
    ("shimmercat-devlove: {}", ["devlove.yaml:1: shimmercat-devlove: the key"
                                " domains is missing"]),
    ("shimmercat-devlove: {domains: {}}", [
        "devlove.yaml:1: shimmercat-devlove > domains: got nothing, expected"
        " at least one domain"]),
    ("shimmercat-devlove: {domains: {a.test: }}", [
        "devlove.yaml:1: shimmercat-devlove > domains > a.test: got nothing,"
        " expected keys with values"]),
    (SMALLEST + "\nother: 1", [
        "devlove.yaml:2: other: unknown key, expected shimmercat-devlove"]),
    ("a: [", ["devlove.yaml:1:5: not YAML: expected the node content, but"
              " found '<stream end>'"]),
])
def test_a_file_of_a_wrong_shape_is_named(refuse, text, mistakes):
    assert refuse(text) == mistakes


def test_a_folder_without_devlove_yaml_is_named(site):
    with pytest.raises(ConfigurationError, match="devlove.yaml: cannot be"
                       " read: No such file or directory"):
        load_settings(argparse.Namespace(mode="devlove", working_dir=site))


def test_a_domain_given_twice_is_named_with_both_places(refuse, site):
    assert refuse(
        "shimmercat-devlove:\n  domains:\n    a.test: {root-dir: www}\n"
        "    api A.TEST: {port: 1}\n") == [
            "devlove.yaml:4: shimmercat-devlove > domains > api A.TEST:"
            f" domain given twice; the first is at {site}/devlove.yaml:3"]


def test_an_unknown_kind_of_domain_is_named(refuse):
    assert "got the kind 'static', expected elec or api" in refuse(
        electric("root-dir: www", name="static a.test"))[0]


@pytest.mark.parametrize(("value", "mistake"), [
    ("{}", "the key port is missing"),
    ("{port: }", "port: got nothing, expected an address"),
    ("{port: [80]}", "port: got a list, expected an address"),
    ("{port: 99999}", "port: got '99999', expected an address like"),
    ("{port: 80, views-dir: www}", "views-dir: unknown key, "),
    ("{port: 80, connect-to: 81}", "connect-to: unknown key, "),
])
def test_a_mistake_in_an_api_domain_is_named(refuse, value, mistake):
    found = refuse("shimmercat-devlove:\n  domains:\n"
                   f"    api a.test: {value}\n")
    assert len(found) == 1
    assert mistake in found[0]


def test_all_mistakes_of_both_files_are_reported_in_their_order(refuse):
    lines = [re.match(r"[^ ]+:(\d+): ", mistake)[1] for mistake in refuse(
        electric("root-dir: nowhere", "view-dir: views", "root-dir: www",
                 "cache-key:", "bot-protection-enabled: maybe"),
        "idle-seconds: soon\nbacklogg: 3\n")]
    assert lines == ["4", "5", "6", "7", "8", "1", "2"]


def test_reading_the_settings_writes_nothing(load, site):
    load()
    before = sorted(site.rglob("*"))
    assert load().tweaks == Tweaks()
    assert sorted(site.rglob("*")) == before


def test_the_text_of_tweaks_has_each_key_with_meaning_and_default():
    keys = yaml.safe_load(tweaks_text())
    tweaks = {option.name: option for option in OPTIONS
              if option.where == "tweak"}
    assert list(keys) == list(tweaks)
    for name, value in keys.items():
        assert tweaks[name].read(str(value)) == tweaks[name].default
        assert f"# {tweaks[name].text}\n" in tweaks_text()


def test_tweaks_that_are_left_out_have_their_default(load):
    tweaks = load(tweaks="idle-seconds: 7.5\nmax-body-bytes: 3 MiB\n"
                  "tls-minimum: 1.3\nbacklog: '64'\ncache-control: no-store\n"
                  ).tweaks
    assert tweaks == dataclasses.replace(
        Tweaks(), idle_seconds=7.5, max_body_bytes=3 << 20, backlog=64,
        tls_minimum="1.3", cache_control="no-store")


def test_trusted_proxies_are_networks_addresses_and_unix_sockets(load):
    tweaks = load(tweaks="trusted-proxies:\n- 10.0.0.0/8\n- 2001:db8::/32\n"
                  "- 192.0.2.7\n- unix\n").tweaks
    assert tweaks.trusted_proxies == (
        *map(ipaddress.ip_network, ("10.0.0.0/8", "2001:db8::/32",
                                    "192.0.2.7/32")), "unix")


@pytest.mark.parametrize("text", ["", "# all keys commented out\n", "{}"])
def test_an_empty_tweaks_yaml_means_all_defaults(load, text):
    assert load(tweaks=text).tweaks == Tweaks()


def test_tweaks_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Tweaks().backlog = 5


@pytest.mark.parametrize(("line", "mistake"), [
    ("idle_seconds: 3", "idle_seconds: unknown key, nearest known:"
     " idle-seconds"),
    ("idel-seconds: 3", "nearest known: idle-seconds"),
    # They are too many to list.
    ("keepalive: 3", "unknown key, nearest known: keep-removed-days"),
    ("idle-seconds: 0", "got '0', expected seconds from 1 to 86400"),
    ("idle-seconds: -3", "got '-3', expected seconds"),
    ("idle-seconds: 3 s", "got '3 s', expected seconds"),
    ("idle-seconds: .inf", "got '.inf', expected seconds"),
    ("idle-seconds:", "got nothing, expected seconds"),
    ("idle-seconds: [3]", "got a list, expected seconds"),
    ("idle-seconds: true", "got 'true', expected seconds"),
    ("backlog: 3.5", "got '3.5', expected a whole number from 16 to 65535"),
    ("backlog: 99999999999999999999", "expected a whole number from 16"),
    ("artisan-nice: 20", "got '20', expected a whole number from 0 to 19"),
    ("max-header-bytes: 1", "expected a size such as 64 KiB from 1 KiB to"),
    ("max-header-bytes: much", "got 'much', expected a size such as 64 KiB"),
    ("tls-minimum: 1.1", "got '1.1', expected 1.2 or 1.3"),
    ('cache-control: "a\\r\\nset-cookie: b"', "expected ASCII text"),
    ("trusted-proxies: 10.0.0.0/8", "got '10.0.0.0/8', expected a list"),
    ("trusted-proxies: [10.0.0.1/8]", "trusted-proxies > 1: got '10.0.0.1/8',"
     " expected a network such as 10.0.0.0/8"),
    ("trusted-proxies: [unix, localhost]", "trusted-proxies > 2: got"
     " 'localhost', expected a network such as 10.0.0.0/8"),
    ("backlog: 20\nbacklog: 30", "given twice; the first is in line 1"),
])
def test_a_mistake_in_tweaks_yaml_is_named(refuse, line, mistake):
    found = refuse(SMALLEST, line)
    assert len(found) == 1
    assert found[0].startswith(".shimmercat.loves.devs/tweaks.yaml:")
    assert mistake in found[0]


def test_flags_have_the_published_defaults(load, site):
    settings = load()
    assert str(settings.listen) == "0.0.0.0:4043"
    assert settings.scratch_dir == site / ".shimmercat.loves.devs"
    assert settings.redirect is None
    assert settings.workers >= 2
    assert settings.log_codes == shimmercat.CodeSet.parse("default")
    assert settings.log_format == "text"
    assert settings.log_file is None
    assert settings.apoptosis_seconds[0] >= 900


def test_flags_are_taken_as_texts_and_as_values(load, site):
    settings = load(listen="[::1]:443", redirect="80", workers=5,
                    log_codes="empty", log_file="x.log",
                    apoptosis_seconds="900-1800")
    assert str(settings.listen) == "[::1]:443"
    assert settings.redirect == NetworkAddress("inet", "127.0.0.1", 80)
    assert settings.workers == 5
    assert settings.log_codes == frozenset()
    assert settings.log_file == site / "x.log"
    assert settings.apoptosis_seconds == (900, 1800)


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/tmp", "a\0b"])
def test_a_scratch_folder_has_a_name_and_no_path(load, name):
    with pytest.raises(ValueError, match="expected a name without /"):
        load(scratch_dir_name=name)


def test_options_are_sorted_and_their_defaults_lawful():
    assert list(OPTIONS) == sorted(OPTIONS, key=lambda x: (x.where, x.name))
    for option in OPTIONS:
        if option.default not in (None, False, ()):
            assert option.read(str(option.shown(option.default)))


def test_the_full_sample_of_tweaks_is_what_the_program_writes():
    assert (CONF / "tweaks.full.yaml").read_text() == tweaks_text()


def uncommented(text):
    """A sample with all its keys in force."""
    return re.sub(r"^( *)#(?=[a-z-])", r"\1", text, flags=re.MULTILINE)


def test_the_full_sample_of_devlove_loads_as_shipped(load, site):
    text = (CONF / "devlove.full.yaml").read_text()
    domain = load(text).domains["www.example.test"]
    assert domain == DomainSettings(
        "www.example.test", "elec", domain.place,
        root_dir=site / "www", views_dir=site / "www")


def test_the_full_sample_of_devlove_shows_each_key_at_its_default(load):
    text = uncommented((CONF / "devlove.full.yaml").read_text())
    domain = load(text).domains["www.example.test"]
    assert domain.prob_accelerator_kicks_in == 1.0
    assert not domain.bot_protection_enabled
    consultant = domain.consultants["default"]
    assert consultant == ConsultantSettings(
        "default", consultant.connect_to, use_host=consultant.use_host,
        ca_file=consultant.ca_file, document_root=consultant.document_root,
        script_name=consultant.script_name)
    assert len(load(text).domains) == 4


def test_the_full_sample_of_devlove_has_every_key():
    text = uncommented((CONF / "devlove.full.yaml").read_text())
    fields = [field.name.replace("_", "-") for kind in (
        ConsultantSettings, RemoteRoot, DomainSettings)
        for field in dataclasses.fields(kind)]
    own = {"name", "kind", "place", "remote-root"}
    keys = set(re.findall(r"[\w-]+(?=:(?: |$))", text, re.MULTILINE))
    assert not set(fields) - own - keys
    assert {"consultant", "tOld", "tNew"} <= keys
