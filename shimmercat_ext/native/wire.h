/* The socket of a connection and the TLS on it, as wire.c moves them. */

#ifndef SHIMMERCAT_WIRE_H
#define SHIMMERCAT_WIRE_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <stdbool.h>
#include <stdint.h>

/* What is read from the socket at a time; a record and a half. */
#define SEALED_BYTES (24 * 1024)
/* Octets of a TLS record. */
#define RECORD_BYTES 16384
/* What can be opened of that, with a record that was complete but for its
 * last octet before. */
#define OPENED_BYTES (SEALED_BYTES + RECORD_BYTES)

/* Functions of the OpenSSL that Python's ssl module is linked with. */
typedef struct {
    int (*read)(void *ssl, void *to, size_t room, size_t *count);
    int (*write)(void *ssl, const void *from, size_t length, size_t *count);
    int (*get_error)(const void *ssl, int result);
    void *(*get_ex_data)(const void *ssl, int index);
    void *(*get_rbio)(const void *ssl);
    void *(*get_wbio)(const void *ssl);
    int (*bio_read)(void *bio, void *to, int room);
    int (*bio_write)(void *bio, const void *from, int length);
    size_t (*bio_ctrl_pending)(void *bio);
} tls_library;

typedef struct {
    const tls_library *library; /* borrowed */
    int socket;
    PyObject *tls;        /* Python's, which keeps the others alive; or NULL */
    void *ssl, *in, *out; /* SSL *, BIO * that it reads from and writes to */
} wire;

typedef enum {
    WIRE_GAVE,   /* octets, or the end of TLS */
    WIRE_SILENT, /* nothing came that could be opened */
    WIRE_CLOSED, /* the socket gave its end */
    WIRE_BROKEN  /* an ssl.SSLError or OSError is set, or memory is short */
} wire_news;

/* An attribute, new.  Its name is interned: Python's cache of attributes would
 * keep each copy of it. */
PyObject *attribute_of(PyObject *object, const char *name);

/* Finds the functions; false where they are out of reach, with an error when
 * memory is short. */
bool wire_find_library(tls_library *to);

/* Attaches to an ssl.SSLObject over ssl.MemoryBIO objects, whose handshake is
 * over, and to the socket below; false when that is no object that we can see
 * into, with an error when memory is short. */
bool wire_attach(wire *it, const tls_library *library, PyObject *tls,
                 int socket);

void wire_detach(wire *it);

/* What came. */
typedef struct {
    uint8_t octets[OPENED_BYTES];
    size_t count;
    int records; /* how many of TLS had octets */
    bool ended;  /* whether TLS ends behind them */
} wire_input;

/* Opens what came, all of it, into an empty `input`. */
wire_news wire_take(const wire *it, wire_input *input);

/* Sends sealed octets, a bytes-like object: the rest as a new bytes object;
 * NULL with an error. */
PyObject *wire_push(const wire *it, PyObject *sealed);

/* Sends octets, and what TLS has to say by itself.  A new bytes object with
 * what the socket did not take, sealed; NULL with an error. */
PyObject *wire_put(const wire *it, const uint8_t *octets, size_t length);

#endif
