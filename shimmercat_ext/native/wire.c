/* Octets between a socket, Python's ssl and an engine.
 *
 * This is room 16c's TlsWire for turns that the engine takes alone.  TLS stays
 * Python's: ssl.SSLContext has the certificates and the choice of versions,
 * ssl.SSLObject shakes hands, keeps what is incomplete and ends.  In between
 * the same OpenSSL functions are called that its methods call, on the same
 * objects, but without a bytes object for each step.
 *
 * OpenSSL is the one that is loaded already, whose functions are looked up in
 * the _ssl module; so nothing is linked, and there are never two of them.  Its
 * SSL object is found in Python's, of whose layout `wire_attach` makes sure
 * before it goes by it.  Where either fails, turns are not taken alone.
 *
 * Contract.  The GIL is held throughout: no system call here waits.  The two
 * buffers are found empty and left empty, unless an error is set: then our
 * caller has to see to them.
 */

#include "wire.h"

#include <dlfcn.h>
#include <errno.h>
#include <sys/socket.h>

/* Octets that are sealed and sent at a time: so many stay in the cache of a
 * processor meanwhile; and what TLS adds to a record, at most. */
#define CHUNK_BYTES (4 * RECORD_BYTES)
#define RECORD_ROOM 512

/* OpenSSL's; of its API since 1.1.1. */
enum { SSL_WANTS_READ = 2, SSL_ZERO_RETURN = 6 };

/* How an _ssl._SSLSocket begins, from Python 3.6 on. */
typedef struct {
    PyObject_HEAD
    PyObject *socket; /* none: records go through memory */
    void *ssl;
    PyObject *context;
} python_tls;

PyObject *attribute_of(PyObject *object, const char *name)
{
    PyObject *key = PyUnicode_InternFromString(name);
    PyObject *value = key ? PyObject_GetAttr(object, key) : NULL;
    Py_XDECREF(key);
    return value;
}

/* Clears an error of a kind that a stranger makes. */
static void forgive(PyObject *kind)
{
    if (PyErr_Occurred() && PyErr_ExceptionMatches(kind))
        PyErr_Clear();
}

bool wire_find_library(tls_library *to)
{
    struct { const char *name; void **to; } wanted[] = {
        {"SSL_read_ex", (void **)&to->read},
        {"SSL_write_ex", (void **)&to->write},
        {"SSL_get_error", (void **)&to->get_error},
        {"SSL_get_ex_data", (void **)&to->get_ex_data},
        {"SSL_get_rbio", (void **)&to->get_rbio},
        {"SSL_get_wbio", (void **)&to->get_wbio},
        {"BIO_read", (void **)&to->bio_read},
        {"BIO_write", (void **)&to->bio_write},
        {"BIO_ctrl_pending", (void **)&to->bio_ctrl_pending}};
    PyObject *module = PyImport_ImportModule("_ssl");
    PyObject *path =
        module ? attribute_of(module, "__file__") : NULL;
    const char *file = path ? PyUnicode_AsUTF8(path) : NULL;
    void *handle = file ? dlopen(file, RTLD_LAZY | RTLD_NOLOAD) : NULL;
    bool found = handle != NULL;
    for (size_t n = 0; found && n < sizeof(wanted) / sizeof(*wanted); n++)
        found = (*wanted[n].to = dlsym(handle, wanted[n].name)) != NULL;
    if (handle)
        dlclose(handle);
    Py_XDECREF(path);
    Py_XDECREF(module);
    forgive(PyExc_ImportError);
    forgive(PyExc_AttributeError);
    return found;
}

/* Whether an object is laid out as we know it: `context` is where it belongs,
 * and so what is before it, which knows the object. */
static bool is_as_known(const tls_library *library, PyObject *tls)
{
    const python_tls *inner = (const python_tls *)tls;
    if (strcmp(Py_TYPE(tls)->tp_name, "_ssl._SSLSocket") != 0 ||
        Py_TYPE(tls)->tp_basicsize < (Py_ssize_t)sizeof(python_tls))
        return false;
    PyObject *context = attribute_of(tls, "context");
    bool is_known = context && context == inner->context && inner->ssl &&
                    inner->socket == NULL &&
                    library->get_ex_data(inner->ssl, 0) == tls;
    Py_XDECREF(context);
    return is_known;
}

bool wire_attach(wire *it, const tls_library *library, PyObject *tls,
                 int socket)
{
    PyObject *inner = library->read ? attribute_of(tls, "_sslobj")
                                    : NULL;
    if (inner && is_as_known(library, inner)) {
        void *ssl = ((python_tls *)inner)->ssl;
        wire_detach(it);
        *it = (wire){library, socket, inner, ssl, library->get_rbio(ssl),
                     library->get_wbio(ssl)};
        return true;
    }
    forgive(PyExc_AttributeError);
    Py_XDECREF(inner);
    return false;
}

void wire_detach(wire *it)
{
    it->ssl = it->in = it->out = NULL;
    Py_CLEAR(it->tls);
}

/* Has Python say what is wrong, which it reads off the same object. */
static wire_news complain(const wire *it)
{
    PyObject *octets =
        PyObject_CallMethod(it->tls, "read", "i", RECORD_BYTES);
    if (octets)
        PyErr_SetString(PyExc_OSError, "TLS neither reads nor says why");
    Py_XDECREF(octets);
    return WIRE_BROKEN;
}

/* Opens all records; as wire_take. */
static wire_news open_records(const wire *it, wire_input *input)
{
    const tls_library *library = it->library;
    do {
        size_t more = 0;
        int result =
            library->read(it->ssl, input->octets + input->count,
                          OPENED_BYTES - input->count, &more);
        input->count += more;
        input->records += more > 0;
        if (result > 0)
            continue;
        int reason = library->get_error(it->ssl, result);
        input->ended = reason == SSL_ZERO_RETURN;
        if (input->ended)
            break;
        /* If it is read, the rest of a record is to come. */
        if (reason != SSL_WANTS_READ)
            return complain(it);
        return input->count ? WIRE_GAVE : WIRE_SILENT;
    } while (library->bio_ctrl_pending(it->in) &&
             input->count < OPENED_BYTES);
    return WIRE_GAVE;
}

wire_news wire_take(const wire *it, wire_input *input)
{
    uint8_t sealed[SEALED_BYTES];
    ssize_t length = recv(it->socket, sealed, sizeof(sealed), MSG_DONTWAIT);
    if (length == 0)
        return WIRE_CLOSED;
    if (length < 0 && (errno == EAGAIN || errno == EINTR))
        return WIRE_SILENT;
    if (length < 0) {
        PyErr_SetFromErrno(PyExc_OSError);
        return WIRE_BROKEN;
    }
    if (it->library->bio_write(it->in, sealed, (int)length) != length) {
        PyErr_NoMemory();
        return WIRE_BROKEN;
    }
    return open_records(it, input);
}

/* Sends as much as the socket takes: the rest as a new bytes object. */
static PyObject *send_octets(const wire *it, const uint8_t *octets,
                             size_t length)
{
    ssize_t count =
        send(it->socket, octets, length, MSG_DONTWAIT | MSG_NOSIGNAL);
    if (count < 0 && errno != EAGAIN && errno != EINTR)
        return PyErr_SetFromErrno(PyExc_OSError);
    if (count < 0)
        count = 0;
    return PyBytes_FromStringAndSize((const char *)octets + count,
                                     (Py_ssize_t)length - count);
}

PyObject *wire_push(const wire *it, PyObject *sealed)
{
    Py_buffer view;
    if (PyObject_GetBuffer(sealed, &view, PyBUF_SIMPLE) < 0)
        return NULL;
    PyObject *rest = send_octets(it, view.buf, (size_t)view.len);
    PyBuffer_Release(&view);
    return rest;
}

/* Sends what TLS has sealed, behind what is unsent; steals that. */
static PyObject *send_sealed(const wire *it, PyObject *unsent)
{
    uint8_t octets[CHUNK_BYTES + CHUNK_BYTES / RECORD_BYTES * RECORD_ROOM];
    int count;
    while (unsent && (count = it->library->bio_read(
                          it->out, octets, sizeof(octets))) > 0) {
        PyObject *rest =
            PyBytes_GET_SIZE(unsent)
                ? PyBytes_FromStringAndSize((char *)octets, count)
                : send_octets(it, octets, (size_t)count);
        if (rest)
            PyBytes_ConcatAndDel(&unsent, rest);
        else
            Py_CLEAR(unsent);
    }
    return unsent;
}

PyObject *wire_put(const wire *it, const uint8_t *octets, size_t length)
{
    PyObject *unsent = PyBytes_FromStringAndSize(NULL, 0);
    do {
        size_t chunk = length < CHUNK_BYTES ? length : CHUNK_BYTES;
        size_t count = 0;
        if (chunk && it->library->write(it->ssl, octets, chunk, &count) <= 0) {
            complain(it);
            Py_CLEAR(unsent);
        }
        octets += count;
        length -= count;
        unsent = unsent ? send_sealed(it, unsent) : NULL;
    } while (unsent && length);
    return unsent;
}
