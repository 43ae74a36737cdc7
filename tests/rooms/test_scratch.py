"""Rooms 8, Scratch, and 8b, Certificates."""

import contextlib
import datetime
import os
import select
import signal
import socket
import ssl
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa

import shimmercat
from shimmercat import (
    CertificateError,
    CertificateStore,
    ScratchBusy,
    ScratchError,
    ScratchFolder,
    write_atomically,
)

NAMES = ["www.example.com", "example.com", "xn--bcher-kva.example"]
KEY = "privkey.unencrypted-pkcs8.pem"


@pytest.fixture
def scratch(tmp_path):
    folder = ScratchFolder(tmp_path / "scratch")
    for part in (folder.path, folder.cache, folder.sni_certificates):
        part.mkdir()
    return folder


@pytest.fixture
def make_store(scratch, tmp_path):
    """Make stores of one scratch folder whose CA is not the user's."""
    def make(names=NAMES, **options):
        return CertificateStore(
            scratch, names, authority_dir=tmp_path / "ca", **options)
    return make


@contextlib.contextmanager
def program(text, *arguments, **environment):
    """A Python process that has shimmercat; killed at the end."""
    path = str(Path(shimmercat.__file__).parent)
    child = subprocess.Popen(
        [sys.executable, "-c", text, *map(str, arguments)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": path, **environment})
    with child:
        try:
            yield child
        finally:
            child.kill()


def output_of(text, *arguments, **environment):
    """What a Python process prints until it ends."""
    with program(text, *arguments, **environment) as child:
        printed, _ = child.communicate(timeout=60)
        assert child.returncode == 0
        return printed


def leaf(folder):
    return x509.load_pem_x509_certificate((folder / "cert.pem").read_bytes())


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def write_operators_pair(folder, names, begin=-1, end=90, key=None):
    """A certificate by a CA that is not ours, valid for the days given."""
    key = key or rsa.generate_private_key(65537, 2048)
    folder.mkdir(parents=True, exist_ok=True)
    now = datetime.datetime.now(datetime.UTC)
    name = x509.Name([])
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), 1,
                                now + datetime.timedelta(days=begin),
                                now + datetime.timedelta(days=end))
        .add_extension(x509.SubjectAlternativeName(
            [x509.DNSName(name) for name in names]), False)
        .sign(key, hashes.SHA256()))
    pem = serialization.Encoding.PEM
    (folder / "cert.pem").write_bytes(certificate.public_bytes(pem))
    (folder / KEY).write_bytes(key.private_bytes(
        pem, serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption()))


class Visitor:
    """A TLS client and a server's socket, at the ends of one socketpair."""

    def __init__(self, server_context, name, ca_file=None, newest=None):
        near, self.far = socket.socketpair()
        near.setblocking(False)
        self.server = server_context.wrap_socket(
            near, server_side=True, do_handshake_on_connect=False)
        context = ssl.create_default_context(
            cafile=ca_file and str(ca_file))
        if ca_file is None:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        if newest:
            context.maximum_version = newest
        context.set_alpn_protocols(["h2"])
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.client = context.wrap_bio(
            self.incoming, self.outgoing, server_hostname=name)

    def turn(self, step, *arguments):
        """One step of either side, then what the client has to send."""
        with contextlib.suppress(ssl.SSLWantReadError):
            result = step(*arguments)
            self.move()
            return result
        self.move()
        return None

    def move(self):
        """Carry bytes between the client and the socket."""
        if self.outgoing.pending:
            self.far.send(self.outgoing.read())
        while select.select([self.far], [], [], 0)[0]:
            received = self.far.recv(65536)
            if not received:
                break
            self.incoming.write(received)

    def shake_hands(self):
        for _ in range(4):
            self.turn(self.client.do_handshake)
            self.turn(self.server.do_handshake)
        return self

    def close(self):
        self.server.close()
        self.far.close()


def shown_certificate(context, name):
    """DNS names in the certificate that a client gets for a name."""
    visitor = Visitor(context, name).shake_hands()
    shown = x509.load_der_x509_certificate(
        visitor.client.getpeercert(binary_form=True))
    visitor.close()
    return dns_names(shown)


def dns_names(certificate):
    return certificate.extensions.get_extension_for_class(
        x509.SubjectAlternativeName).value.get_values_for_type(x509.DNSName)


class TestScratchFolder:
    def test_nothing_is_created_before_the_folder_is_occupied(self, tmp_path):
        ScratchFolder(tmp_path / "scratch")
        assert not list(tmp_path.iterdir())

    def test_all_parts_are_there_and_private_afterwards(self, tmp_path):
        assert output_of(OCCUPY, tmp_path / "a/scratch") == "occupied\n"
        folder = ScratchFolder(tmp_path / "a/scratch")
        parts = [folder.path, folder.cache, folder.sni_certificates]
        assert [mode(part) for part in parts] == [0o700] * 3

    def test_a_second_instance_is_told_who_holds_the_folder(self, tmp_path):
        with program(OCCUPY + WAIT, tmp_path) as holder:
            assert holder.stdout.readline() == "occupied\n"
            with pytest.raises(ScratchBusy, match=f"process {holder.pid};"):
                ScratchFolder(tmp_path).occupy()
        assert ScratchBusy.exit_code == 75

    def test_forks_that_survive_the_holder_do_not_hold_the_folder(
            self, tmp_path):
        with program(OCCUPY_AND_FORK + WAIT, tmp_path) as holder:
            child = int(holder.stdout.readline())
            holder.kill()
            holder.wait()
            try:
                assert output_of(OCCUPY, tmp_path) == "occupied\n"
                os.kill(child, 0)
            finally:
                os.kill(child, signal.SIGKILL)

    def test_who_serves_the_same_sockets_may_be_there_too(self, tmp_path):
        share = OCCUPY.replace(".occupy(", ".occupy(door='7', ")
        assert share != OCCUPY
        with program(share + WAIT, tmp_path) as holder:
            assert holder.stdout.readline() == "occupied\n"
            with pytest.raises(ScratchBusy):
                ScratchFolder(tmp_path).occupy(door="8")
            plain, guest = ScratchFolder(tmp_path), ScratchFolder(tmp_path)
            guest.occupy(door="7")
            assert guest.redis_socket != plain.redis_socket
            assert not guest.claim()
            assert guest.lock is None
            assert plain.holder() == str(holder.pid)
            assert plain.redis_socket.name == f"redis-{holder.pid}.sock"
        assert guest.claim()
        guest.release()
        assert plain.holder() == ""

    def test_a_lock_that_was_passed_on_is_signed_anew(self, tmp_path):
        first, second = ScratchFolder(tmp_path), ScratchFolder(tmp_path)
        first.occupy()
        before = (tmp_path / "lock").read_text()
        second.occupy(lock=first.lock)
        assert second.claim()
        assert (tmp_path / "lock").read_text() != before
        second.release()

    def test_drafts_are_removed_by_the_holder_only(self, tmp_path):
        folder = ScratchFolder(tmp_path)
        folder.occupy()
        drafts = [tmp_path / ".draft-1", folder.cache / ".draft-2",
                  folder.cache / "v1" / "ab" / ".draft-3"]
        drafts[-1].parent.mkdir(parents=True)
        others = [drafts[-1].with_name("whole"), tmp_path / "cert.pem"]
        for path in (*drafts, *others):
            path.touch()
        ScratchFolder(tmp_path).tidy()
        assert all(path.exists() for path in drafts)
        folder.tidy()
        assert not any(path.exists() for path in drafts)
        assert all(path.exists() for path in others)
        folder.release()

    def test_a_tweaks_yaml_is_written_once(self, tmp_path):
        written = tmp_path / "tweaks.yaml"
        for text in ("idle-seconds: 1", "idle-seconds: 2"):
            folder = ScratchFolder(tmp_path)
            folder.occupy(text)
            assert written.read_text() == "idle-seconds: 1"

    def test_a_folder_that_cannot_be_made_is_named(self, tmp_path):
        (tmp_path / "file").touch()
        with pytest.raises(ScratchError, match=str(tmp_path / "file")):
            ScratchFolder(tmp_path / "file/scratch").occupy()

    def test_a_path_too_long_for_a_socket_gets_a_private_short_one(
            self, tmp_path):
        with tempfile.TemporaryDirectory() as home:
            path = output_of(SOCKET, tmp_path / ("x" * 99),
                             XDG_CONFIG_HOME=home)
            assert Path(path).parent == Path(home, "shimmercat")
            assert mode(Path(path).parent) == 0o700


class TestDevelopmentCertificates:
    def test_the_leaf_names_all_domains_and_this_machine(
            self, make_store, scratch):
        make_store().ensure()
        assert dns_names(leaf(scratch.path)) == [
            "www.example.com", "example.com", "xn--bcher-kva.example",
            "localhost"]

    def test_the_leaf_lasts_no_longer_than_browsers_allow(
            self, make_store, scratch):
        make_store().ensure()
        made = leaf(scratch.path)
        span = made.not_valid_after_utc - made.not_valid_before_utc
        assert datetime.timedelta(days=396) < span
        assert span < datetime.timedelta(days=398)

    def test_files_have_the_products_names_and_keys_are_private(
            self, make_store, scratch):
        make_store().ensure()
        modes = {path.name: mode(path) for path in scratch.path.iterdir()
                 if path.is_file()}
        assert modes == dict.fromkeys(
            ("cert.pem", "cert.csr", KEY, "privkey.pem"), 0o600)
        text = (scratch.path / "privkey.pem").read_text()
        assert text.startswith("-----BEGIN EC PRIVATE KEY-----")

    def test_the_signing_request_covers_all_domains(
            self, make_store, scratch):
        make_store().ensure()
        request = x509.load_pem_x509_csr(
            (scratch.path / "cert.csr").read_bytes())
        assert request.is_signature_valid
        assert dns_names(request) == [
            "www.example.com", "example.com", "xn--bcher-kva.example"]

    def test_a_name_longer_than_a_common_name_may_be_works(
            self, make_store, scratch):
        name = "a" * 60 + ".example.com"
        make_store([name]).ensure()
        assert dns_names(leaf(scratch.path))[0] == name

    def test_a_client_that_has_the_ca_trusts_the_leaf(self, make_store):
        store = make_store()
        store.ensure()
        visitor = Visitor(store.context(), NAMES[2], store.ca_file)
        visitor.shake_hands()
        assert visitor.client.version() == "TLSv1.3"
        visitor.close()

    def test_the_ca_is_private_and_signs_leaves_only(
            self, make_store, tmp_path):
        store = make_store()
        store.ensure()
        both = tmp_path / "ca/ca_key_and_cert.pem"
        assert (mode(both.parent), mode(both)) == (0o700, 0o600)
        authority = x509.load_pem_x509_certificate(
            store.ca_file.read_bytes())
        limits = authority.extensions.get_extension_for_class(
            x509.BasicConstraints).value
        assert (limits.ca, limits.path_length) == (True, 0)

    def test_a_second_site_of_the_user_has_the_same_ca(
            self, make_store, tmp_path):
        first = make_store()
        first.ensure()
        other = ScratchFolder(tmp_path / "other")
        other.path.mkdir()
        second = CertificateStore(other, ["b.example"],
                                  authority_dir=tmp_path / "ca")
        second.ensure()
        assert first.ca_file == second.ca_file
        leaf(other.path).verify_directly_issued_by(
            x509.load_pem_x509_certificate(first.ca_file.read_bytes()))

    def test_several_makers_of_the_ca_at_once_agree_on_one(self, tmp_path):
        with contextlib.ExitStack() as stack:
            children = [stack.enter_context(program(
                MAKE_LEAF, tmp_path / f"scratch{n}", tmp_path / "ca"))
                for n in range(6)]
            for child in children:
                assert child.stdout.readline() == "ready\n"
            for child in children:
                child.stdin.write("go\n")
                child.stdin.flush()
            printed = {child.communicate(timeout=60)[0]
                       for child in children}
        assert len(printed) == 1
        assert not list((tmp_path / "ca").glob(".draft*"))

    def test_the_ca_moves_to_the_scratch_folder_when_home_refuses(
            self, scratch, tmp_path, said):
        (tmp_path / "file").touch()
        store = CertificateStore(scratch, NAMES,
                                 authority_dir=tmp_path / "file/shimmercat")
        store.ensure()
        assert store.ca_file.is_relative_to(scratch.path)
        assert 40032 in [record.code for record in said]

    def test_that_ca_is_known_at_the_next_start(self, scratch, tmp_path):
        (tmp_path / "file").touch()
        stores = [CertificateStore(scratch, NAMES,
                                   authority_dir=tmp_path / "file/shimmercat")
                  for _ in range(2)]
        for store in stores:
            store.ensure()
        assert stores[0].ca_file
        assert stores[0].ca_file == stores[1].ca_file

    def test_a_leaf_of_a_lost_ca_is_replaced(self, make_store, tmp_path):
        make_store().ensure()
        (tmp_path / "ca").rename(tmp_path / "lost")
        store = make_store()
        store.ensure()
        visitor = Visitor(store.context(), NAMES[0], store.ca_file)
        assert visitor.shake_hands().client.version() == "TLSv1.3"
        visitor.close()

    def test_a_broken_ca_is_named(self, make_store, tmp_path):
        (tmp_path / "ca").mkdir()
        (tmp_path / "ca/ca_key_and_cert.pem").write_text("nonsense")
        with pytest.raises(CertificateError, match="ca_key_and_cert.pem"):
            make_store().ensure()

    def test_a_good_leaf_is_kept(self, make_store, scratch):
        make_store().ensure()
        before = leaf(scratch.path)
        store = make_store()
        store.ensure()
        assert leaf(scratch.path) == before
        assert store.ca_file.is_file()

    def test_a_new_domain_renews_the_leaf_but_not_the_key(
            self, make_store, scratch):
        make_store(["a.example"]).ensure()
        key = (scratch.path / KEY).read_bytes()
        make_store(["a.example", "b.example"]).ensure()
        assert "b.example" in dns_names(leaf(scratch.path))
        assert (scratch.path / KEY).read_bytes() == key

    def test_a_leaf_near_its_end_is_renewed(self, make_store, scratch):
        short = make_store()
        short.leaf_days = 29
        short.ensure()
        before = leaf(scratch.path)
        make_store().ensure()
        assert leaf(scratch.path) != before

    def test_an_operators_certificate_is_never_touched(
            self, make_store, scratch):
        write_operators_pair(scratch.path, ["other.example"], -9, -1)
        before = {path: path.read_bytes() for path in scratch.path.iterdir()
                  if path.is_file()}
        store = make_store()
        store.ensure()
        assert store.ca_file is None
        assert {path: path.read_bytes() for path in scratch.path.iterdir()
                if path.is_file()} == before


class TestRenewal:
    NAMES = ("one.example", "two.example")

    @pytest.fixture
    def stores(self, scratch, make_store):
        """A store with a context, and a function that makes the next one."""
        write_operators_pair(scratch.path, self.NAMES)
        write_operators_pair(scratch.sni_certificates / "two.example",
                             self.NAMES[1:])
        first = make_store(self.NAMES)
        context = first.context()
        return first, context, lambda names=self.NAMES, **options: make_store(
            names, before=first, **options)

    def test_what_has_not_changed_keeps_its_context(self, stores):
        first, context, renewed = stores
        second = renewed()
        assert second.context() is context
        assert second.used() == first.used() == first.found()

    def test_another_minimum_makes_another_context(self, stores):
        _, context, renewed = stores
        assert renewed(tls_minimum="1.3").context() is not context

    def test_a_renewed_pair_is_shown(self, stores, scratch):
        first, context, renewed = stores
        write_operators_pair(scratch.path, (*self.NAMES, "three.example"))
        assert first.found() != first.used()
        second = renewed()
        assert second.context() is not context
        assert second.used() == first.found()
        assert shown_certificate(second.context(), "one.example") == [
            *self.NAMES, "three.example"]

    @pytest.mark.parametrize("folder", ["", "sni-certs/two.example"])
    def test_a_pair_with_problems_is_refused_and_nothing_changes(
            self, stores, scratch, folder):
        first, context, renewed = stores
        for spoil, words in (
                (lambda path: write_operators_pair(path, self.NAMES, -9, -1),
                 "has expired"),
                (lambda path: write_operators_pair(path, ["x.example"]),
                 "misses the domain"),
                (lambda path: (path / KEY).write_text("half"), "no line"),
                (lambda path: (path / KEY).unlink(), "No such file")):
            spoil(scratch.path / folder)
            with pytest.raises(CertificateError, match=words):
                renewed().context()
        assert shown_certificate(context, "two.example") == ["two.example"]

    def test_no_development_leaf_takes_the_place_of_an_operators(
            self, stores, scratch):
        _, _, renewed = stores
        (scratch.path / "cert.pem").unlink()
        with pytest.raises(CertificateError, match="cert.pem is missing"):
            renewed().ensure()
        assert not (scratch.path / "cert.pem").exists()

    def test_nor_that_of_an_operators_for_one_domain(
            self, scratch, make_store):
        write_operators_pair(
            scratch.sni_certificates / "two.example", ["two.example"])
        first = make_store(self.NAMES)
        first.ensure()
        first.context()
        (scratch.sni_certificates / "two.example" / "cert.pem").unlink()
        with pytest.raises(CertificateError, match="two.example/cert.pem is"):
            make_store(self.NAMES, before=first).ensure()
        make_store(["one.example"], before=first).ensure()

    def test_who_loses_a_certificate_of_its_own_needs_another(
            self, stores, scratch, make_store):
        first, context, renewed = stores
        (scratch.sni_certificates / "two.example" / "cert.pem").unlink()
        assert renewed().context() is context
        write_operators_pair(scratch.path, ["one.example"])
        write_operators_pair(scratch.sni_certificates / "two.example",
                             ["two.example"])
        before = make_store(self.NAMES)
        before.context()
        (scratch.sni_certificates / "two.example" / "cert.pem").unlink()
        with pytest.raises(CertificateError, match="misses the domain two"):
            make_store(self.NAMES, before=before).context()
        make_store(["one.example"], before=before).context()

    def test_what_was_wrong_before_is_no_reason_against_another_change(
            self, scratch, make_store):
        write_operators_pair(scratch.path, ["one.example"], -9, -1)
        first = make_store(self.NAMES)
        context = first.context()
        assert make_store(self.NAMES, before=first).context() is context


class TestProblems:
    def test_a_good_pair_has_none(self, make_store, scratch):
        write_operators_pair(scratch.path, ["*.example.com", "Example.com"])
        assert make_store(["www.example.com"]).problems() == []

    def test_a_missed_domain_is_named(self, make_store, scratch):
        write_operators_pair(scratch.path, ["*.example.com"])
        assert make_store(["a.example.com", "a.b.example.com"]).problems() == [
            f"{scratch.path}/cert.pem misses the domain a.b.example.com"]

    @pytest.mark.parametrize("begin, end, words", [
        (-9, -1, "has expired on"), (1, 9, "is not valid before")])
    def test_a_wrong_time_is_named(
            self, make_store, scratch, begin, end, words):
        write_operators_pair(scratch.path, NAMES[:2], begin, end)
        [problem] = make_store(NAMES[:2]).problems()
        assert f"{scratch.path}/cert.pem {words}" in problem

    def test_a_key_of_another_certificate_is_named(
            self, make_store, scratch, tmp_path):
        write_operators_pair(scratch.path, NAMES[:2])
        write_operators_pair(tmp_path / "other", NAMES[:2])
        (tmp_path / "other" / KEY).rename(scratch.path / KEY)
        store = make_store(NAMES[:2])
        expected = (f"{scratch.path}/cert.pem does not match its key"
                    f" {scratch.path}/{KEY}")
        assert store.problems() == [expected]
        with pytest.raises(CertificateError, match=expected):
            store.context()

    @pytest.mark.parametrize("name", ["cert.pem", KEY])
    def test_a_file_that_is_missing_or_nonsense_is_named(
            self, make_store, scratch, name):
        write_operators_pair(scratch.path, NAMES[:2])
        store = make_store(NAMES[:2])
        for spoil in (lambda path: path.write_text("x"), Path.unlink):
            spoil(scratch.path / name)
            [problem] = store.problems()
            assert f"{scratch.path}/{name}" in problem
            with pytest.raises(CertificateError, match=name):
                store.context()

    @pytest.mark.parametrize("spoil, words", [
        (lambda pem, _: b"", "has no line -----BEGIN ...-----"),
        (lambda pem, _: ssl.PEM_cert_to_DER_cert(pem.decode()),
         "has no line -----BEGIN ...-----"),
        (lambda _, key: key, "has PRIVATE KEY only"),
        (lambda pem, _: pem[:-30], "breaks off before -----END ...-----"),
        (lambda pem, _: pem.replace(b"M", b"%", 1),
         "is damaged between BEGIN and END"),
        # the second of a chain
        (lambda pem, _: pem + pem.replace(b"M", b"%", 1),
         "is damaged between BEGIN and END")])
    def test_what_is_wrong_in_a_certificate_is_told(
            self, make_store, scratch, spoil, words):
        write_operators_pair(scratch.path, NAMES[:2])
        file = scratch.path / "cert.pem"
        file.write_bytes(spoil(
            file.read_bytes(), (scratch.path / KEY).read_bytes()))
        assert make_store(NAMES[:2]).problems() == [
            f"{file} {words}, expected a PEM file with a CERTIFICATE"]

    @pytest.mark.parametrize("password, form, words", [
        (b"secret", serialization.PrivateFormat.PKCS8, "is encrypted"),
        (b"secret", serialization.PrivateFormat.TraditionalOpenSSL,
         "is encrypted"),
        (b"", None, "has PUBLIC KEY only")])
    def test_what_is_wrong_in_a_key_is_told(
            self, make_store, scratch, password, form, words):
        write_operators_pair(scratch.path, NAMES[:2])
        file, pem = scratch.path / KEY, serialization.Encoding.PEM
        key = serialization.load_pem_private_key(file.read_bytes(), None)
        file.write_bytes(key.private_bytes(
            pem, form, serialization.BestAvailableEncryption(password))
            if password else key.public_key().public_bytes(
                pem, serialization.PublicFormat.SubjectPublicKeyInfo))
        assert make_store(NAMES[:2]).problems() == [
            f"{file} {words}, expected a PEM file with an unencrypted"
            " PRIVATE KEY"]

    def test_a_folder_for_a_name_that_is_not_served_is_named(
            self, make_store, scratch):
        write_operators_pair(scratch.path, ["a.example"])
        for name, hint in (("a.exampel", ", nearest: a.example"), ("zz", "")):
            folder = scratch.sni_certificates / name
            folder.mkdir()
            assert make_store(["a.example"]).problems() == [
                f"{folder} is for none of the domains{hint}"]
            folder.rmdir()

    def test_a_certificate_for_one_name_is_checked_for_that_name(
            self, make_store, scratch):
        write_operators_pair(scratch.path, ["a.example"])
        folder = scratch.sni_certificates / "b.example"
        write_operators_pair(folder, ["c.example"])
        assert make_store(["a.example", "b.example"]).problems() == [
            f"{folder}/cert.pem misses the domain b.example"]


class TestContexts:
    @pytest.mark.parametrize("version", ["TLSv1.2", "TLSv1.3"])
    def test_both_versions_are_spoken_with_forward_secrecy(
            self, make_store, version):
        store = make_store()
        store.ensure()
        newest = ssl.TLSVersion[version.replace(".", "_")]
        visitor = Visitor(store.context(), NAMES[0], store.ca_file, newest)
        visitor.shake_hands()
        assert visitor.server.version() == version
        assert visitor.server.selected_alpn_protocol() == "h2"
        suite = visitor.server.cipher()[0]
        assert suite.startswith(("ECDHE-", "TLS_")), suite
        assert "GCM" in suite or "CHACHA20" in suite
        visitor.close()

    def test_tls_1_2_is_refused_where_1_3_is_the_minimum(self, make_store):
        store = make_store(tls_minimum="1.3")
        store.ensure()
        visitor = Visitor(store.context(), NAMES[0],
                          newest=ssl.TLSVersion.TLSv1_2)
        with pytest.raises(ssl.SSLError):
            visitor.shake_hands()
        visitor.close()

    def test_bytes_go_both_ways_and_the_end_is_seen(self, make_store):
        store = make_store()
        store.ensure()
        visitor = Visitor(store.context(), NAMES[0]).shake_hands()
        with pytest.raises(ssl.SSLWantReadError):
            visitor.server.recv(10)
        visitor.turn(visitor.client.write, b"question")
        assert visitor.server.recv(5) == b"quest"
        assert visitor.server.pending() == 3
        assert visitor.server.recv(10) == b"ion"
        assert visitor.turn(visitor.server.send, b"answer") == 6
        assert visitor.client.read(10) == b"answer"
        visitor.far.close()
        assert visitor.server.recv(10) == b""
        visitor.close()

    def test_a_name_with_its_own_certificate_is_shown_that(
            self, make_store, scratch):
        write_operators_pair(scratch.path, ["a.example"])
        write_operators_pair(scratch.sni_certificates / "b.example",
                             ["b.example"])
        context = make_store(["a.example", "b.example"]).context()
        assert shown_certificate(context, "B.example") == ["b.example"]
        assert shown_certificate(context, "a.example") == ["a.example"]

    @pytest.mark.parametrize("patch", ["patched", "plain"])
    @pytest.mark.parametrize("version", ["TLSv1_2", "TLSv1_3"])
    def test_a_session_begun_with_one_worker_is_resumed_by_another(
            self, tmp_path, patch, version):
        with program(WORKERS, tmp_path, patch) as arbiter:
            first, second = (int(port) for port in
                             arbiter.stdout.readline().split())
            context = ssl.create_default_context()
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
            context.maximum_version = ssl.TLSVersion[version]
            session, before = visit(context, first, None)
            _, after = visit(context, second, session)
        assert (before, after) == (False, True)


def visit(context, port, session):
    """The session of a connection, and whether it was an old one."""
    with socket.create_connection(("127.0.0.1", port), 30) as plain:
        with context.wrap_socket(plain, session=session,
                                 server_hostname="localhost") as tls:
            # Tickets of TLS 1.3 come with the first bytes.
            assert tls.recv(10) == b"ready"
            return tls.session, tls.session_reused


class TestWriteAtomically:
    def test_the_new_content_is_there_and_private(self, tmp_path):
        (tmp_path / "file").touch(0o644)
        write_atomically(tmp_path / "file", b"new")
        assert (tmp_path / "file").read_bytes() == b"new"
        assert mode(tmp_path / "file") == 0o600

    def test_a_failure_leaves_no_draft(self, tmp_path):
        (tmp_path / "folder").mkdir()
        with pytest.raises(IsADirectoryError):
            write_atomically(tmp_path / "folder", b"content")
        assert [path.name for path in tmp_path.iterdir()] == ["folder"]


OCCUPY = """
import sys, shimmercat
shimmercat.ScratchFolder(sys.argv[1]).occupy()
print("occupied", flush=True)
"""
OCCUPY_AND_FORK = """
import os, sys, shimmercat
shimmercat.ScratchFolder(sys.argv[1]).occupy()
child = os.fork()
if child:
    print(child, flush=True)
"""
WAIT = """
sys.stdin.readline()
"""
SOCKET = """
import sys, shimmercat
folder = shimmercat.ScratchFolder(sys.argv[1])
try:
    folder.occupy()
    print(folder.redis_socket, end="")
except shimmercat.ScratchError as error:
    print(error)
"""
MAKE_LEAF = """
import sys, shimmercat
from pathlib import Path
scratch = shimmercat.ScratchFolder(sys.argv[1])
scratch.occupy()
store = shimmercat.CertificateStore(
    scratch, ["a.example"], authority_dir=Path(sys.argv[2]))
print("ready", flush=True)
sys.stdin.readline()
store.ensure()
print(store.ca_file.read_text())
"""
WORKERS = """
import sys
if sys.argv[2] == "patched":
    from gevent import monkey
    monkey.patch_all()
import os, signal, socket, shimmercat
from pathlib import Path
path = Path(sys.argv[1])
scratch = shimmercat.ScratchFolder(path / "scratch")
scratch.occupy()
store = shimmercat.CertificateStore(
    scratch, ["localhost"], authority_dir=path / "ca")
store.ensure()
context = store.context()
listeners = [socket.socket(), socket.socket()]
children = []
for listener in listeners:
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        worker = context.wrap_socket(listener.accept()[0], server_side=True)
        worker.send(b"ready")
        worker.recv(1)
        os._exit(0)
    children.append(child)
print(*(listener.getsockname()[1] for listener in listeners), flush=True)
for child in children:
    os.waitpid(child, 0)
"""
