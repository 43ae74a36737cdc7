/* The hot table, as the engine sees it; hot.c says what it is. */

#ifndef SHIMMERCAT_HOT_H
#define SHIMMERCAT_HOT_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <nghttp2/nghttp2.h>
#include <stdbool.h>
#include <stdint.h>

/* Octets of the longest body that is kept. */
#define HOT_BODY_BYTES (64 * 1024)

typedef struct hot_table hot_table;

/* A ready answer. */
typedef struct hot_answer {
    struct hot_answer *newer, *older; /* by last use */
    PyObject *key;      /* borrowed from the dictionary that has the answer */
    PyObject *kept;     /* owns what the others point into */
    nghttp2_nv *fields; /* the last one is the date, which comes and goes */
    size_t field_count;
    const uint8_t *body;
    size_t length;
    const char *path; /* its source, and what that was when it was read */
    unsigned long long identity[5];
    PyObject *before, *after; /* words of the log, borrowed from `kept` */
    size_t cost;
    bool used;
} hot_answer;

extern PyType_Spec hot_table_spec;

/* The answer to a request with these names and values in turn.  NULL when
 * there is none, and with an error set when memory is short.  Borrowed: the
 * next call of any function or method of the table may end it. */
hot_answer *hot_find(hot_table *self, PyObject *const *fields, size_t count);

/* Whether its source is as it was; if not, the answer is gone. */
bool hot_confirm(hot_table *self, hot_answer *it);

/* Gives it the date of the moment, and remembers that it was of use. */
void hot_use(hot_table *self, hot_answer *it);

/* Nanoseconds of a clock that is never set. */
int64_t hot_now(void);

/* Writes the log record of an answer that took from `start` on; counts it
 * as lost when there is no room. */
void hot_log(hot_table *self, const hot_answer *it, PyObject *client,
             int64_t start);

#endif
