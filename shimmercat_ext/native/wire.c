/* Octets between a socket, Python's ssl and an engine.
 *
 * This is room 16c's TlsWire for turns that the engine takes alone: the same
 * calls of the same objects in the same order, without an interpreter between
 * them.  TLS itself stays Python's, whose ssl.SSLContext has the certificates
 * and the choice of versions; whose objects keep what is incomplete.
 *
 * Contract.  The GIL is held throughout: no system call here waits.  The two
 * buffers are found empty and left empty, unless an error is set: then our
 * caller has to see to them.
 */

#include "wire.h"

#include <errno.h>
#include <sys/socket.h>

/* What is read from the socket at a time; a record and a half. */
#define SEALED_BYTES (24 * 1024)
/* Octets of a TLS record, and of those that are sent at a time: so many stay
 * in the cache of a processor while they are sealed, copied and sent. */
#define RECORD_BYTES 16384
#define CHUNK_BYTES (4 * RECORD_BYTES)

int wire_init(PyObject **words, PyObject *wants_read)
{
    PyObject *fresh[WIRE_WORDS] = {
        Py_NewRef(wants_read), PyUnicode_InternFromString("read"),
        PyUnicode_InternFromString("write"),
        PyUnicode_InternFromString("pending"), PyLong_FromLong(RECORD_BYTES)};
    for (int n = 0; n < WIRE_WORDS; n++)
        Py_XSETREF(words[n], fresh[n]);
    return PyErr_Occurred() ? -1 : 0;
}

/* The number of octets in one of TLS' buffers, -1 with an error. */
static Py_ssize_t count_pending(const wire *it, PyObject *buffer)
{
    PyObject *number = PyObject_GetAttr(buffer, it->words[PENDING]);
    Py_ssize_t count = number ? PyLong_AsSsize_t(number) : -1;
    Py_XDECREF(number);
    return count;
}

/* One record, opened: a new bytes object, NULL with an error. */
static PyObject *open_record(const wire *it)
{
    PyObject *octets = PyObject_CallMethodOneArg(it->tls, it->words[READ],
                                                 it->words[RECORD]);
    if (octets == NULL || PyBytes_CheckExact(octets))
        return octets;
    Py_DECREF(octets);
    PyErr_SetString(PyExc_TypeError, "TLS reads bytes");
    return NULL;
}

/* Opens all records; as wire_take. */
static wire_news open_records(const wire *it, PyObject **opened, bool *ended)
{
    *opened = NULL;
    for (Py_ssize_t left = 1; left > 0 && !*ended;
         left = count_pending(it, it->sealed)) {
        PyObject *piece = open_record(it);
        if (piece == NULL && PyErr_ExceptionMatches(it->words[WANTS_READ])) {
            /* The rest of a record is to come. */
            PyErr_Clear();
            return *opened ? WIRE_GAVE : WIRE_SILENT;
        }
        *ended = piece && PyBytes_GET_SIZE(piece) == 0;
        if (*opened == NULL)
            *opened = piece;
        else if (piece)
            PyBytes_ConcatAndDel(opened, piece);
        if (piece == NULL)
            Py_CLEAR(*opened);
        if (*opened == NULL)
            return WIRE_BROKEN;
    }
    if (!PyErr_Occurred())
        return WIRE_GAVE;
    Py_CLEAR(*opened);
    return WIRE_BROKEN;
}

wire_news wire_take(const wire *it, PyObject **opened, bool *ended)
{
    char octets[SEALED_BYTES];
    ssize_t count = recv(it->socket, octets, sizeof(octets), MSG_DONTWAIT);
    if (count == 0)
        return WIRE_CLOSED;
    if (count < 0 && (errno == EAGAIN || errno == EINTR))
        return WIRE_SILENT;
    if (count < 0) {
        PyErr_SetFromErrno(PyExc_OSError);
        return WIRE_BROKEN;
    }
    PyObject *came = PyBytes_FromStringAndSize(octets, count);
    PyObject *done = came ? PyObject_CallMethodOneArg(
                                it->sealed, it->words[WRITE], came)
                          : NULL;
    Py_XDECREF(came);
    if (done == NULL)
        return WIRE_BROKEN;
    Py_DECREF(done);
    return open_records(it, opened, ended);
}

/* Has TLS seal octets from `*from` on up to `end`. */
static int seal(const wire *it, PyObject *octets, Py_ssize_t *from,
                Py_ssize_t end)
{
    while (*from < end) {
        PyObject *rest =
            *from ? PyMemoryView_FromMemory(
                        PyBytes_AS_STRING(octets) + *from,
                        PyBytes_GET_SIZE(octets) - *from, PyBUF_READ)
                  : Py_NewRef(octets);
        PyObject *number =
            rest ? PyObject_CallMethodOneArg(it->tls, it->words[WRITE], rest)
                 : NULL;
        Py_ssize_t count = number ? PyLong_AsSsize_t(number) : -1;
        Py_XDECREF(number);
        Py_XDECREF(rest);
        if (count < 0)
            return -1;
        *from += count;
    }
    return 0;
}

PyObject *wire_push(const wire *it, PyObject *sealed)
{
    Py_buffer view;
    PyObject *rest = NULL;
    if (PyObject_GetBuffer(sealed, &view, PyBUF_SIMPLE) < 0)
        return NULL;
    ssize_t count = send(it->socket, view.buf, (size_t)view.len,
                         MSG_DONTWAIT | MSG_NOSIGNAL);
    if (count < 0 && errno != EAGAIN && errno != EINTR)
        PyErr_SetFromErrno(PyExc_OSError);
    else if (count <= 0 && PyBytes_CheckExact(sealed))
        rest = Py_NewRef(sealed);
    else
        rest = PyBytes_FromStringAndSize(
            (char *)view.buf + (count > 0 ? count : 0),
            view.len - (count > 0 ? count : 0));
    PyBuffer_Release(&view);
    return rest;
}

/* Sends what TLS has sealed, behind what is unsent; steals that. */
static PyObject *send_sealed(const wire *it, PyObject *unsent)
{
    PyObject *sealed =
        PyObject_CallMethodNoArgs(it->to_send, it->words[READ]);
    if (sealed && !PyBytes_CheckExact(sealed)) {
        PyErr_SetString(PyExc_TypeError, "TLS writes bytes");
        Py_CLEAR(sealed);
    }
    if (sealed && PyBytes_GET_SIZE(unsent)) {
        PyBytes_ConcatAndDel(&unsent, sealed);
        return unsent;
    }
    Py_DECREF(unsent);
    PyObject *rest = sealed ? wire_push(it, sealed) : NULL;
    Py_XDECREF(sealed);
    return rest;
}

PyObject *wire_put(const wire *it, PyObject *octets)
{
    Py_ssize_t from = 0, length = octets ? PyBytes_GET_SIZE(octets) : 0;
    PyObject *unsent = PyBytes_FromStringAndSize(NULL, 0);
    Py_ssize_t pending = 0;
    do {
        Py_ssize_t end =
            length - from > CHUNK_BYTES ? from + CHUNK_BYTES : length;
        if (unsent && seal(it, octets, &from, end) < 0)
            Py_CLEAR(unsent);
        pending = unsent ? count_pending(it, it->to_send) : 0;
        if (pending < 0)
            Py_CLEAR(unsent);
        if (unsent && pending)
            unsent = send_sealed(it, unsent);
    } while (unsent && from < length);
    return unsent;
}
