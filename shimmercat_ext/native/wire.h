/* The socket of a connection and the TLS on it, as wire.c moves them. */

#ifndef SHIMMERCAT_WIRE_H
#define SHIMMERCAT_WIRE_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <stdbool.h>

/* What wire.c needs of Python: an exception, names, a number of octets. */
enum { WANTS_READ, READ, WRITE, PENDING, RECORD, WIRE_WORDS };

typedef struct {
    int socket;
    /* Borrowed: an ssl.SSLObject and the ssl.MemoryBIO objects that it reads
     * from and writes to. */
    PyObject *tls, *sealed, *to_send;
    PyObject *const *words;
} wire;

typedef enum {
    WIRE_GAVE,   /* octets, or the end of TLS */
    WIRE_SILENT, /* nothing came that could be opened */
    WIRE_CLOSED, /* the socket gave its end */
    WIRE_BROKEN  /* an ssl.SSLError or OSError is set, or memory is short */
} wire_news;

/* Fills an array of WIRE_WORDS; -1 with an error. */
int wire_init(PyObject **words, PyObject *wants_read);

/* Opens what came: a new bytes object, and whether TLS ends behind it. */
wire_news wire_take(const wire *it, PyObject **opened, bool *ended);

/* Sends sealed octets, a bytes-like object: the rest as a new bytes object;
 * NULL with an error. */
PyObject *wire_push(const wire *it, PyObject *sealed);

/* Sends octets, which may be NULL, and what TLS has to say by itself.  A new
 * bytes object with what the socket did not take, sealed; NULL with an error.
 */
PyObject *wire_put(const wire *it, PyObject *octets);

#endif
