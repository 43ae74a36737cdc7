/* The hot table, as the engine sees it; hot.c says what it is. */

#ifndef SHIMMERCAT_HOT_H
#define SHIMMERCAT_HOT_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <nghttp2/nghttp2.h>
#include <stdbool.h>
#include <stdint.h>

/* Octets of the longest body that is kept. */
#define HOT_BODY_BYTES (1024 * 1024)

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
    uint8_t level;    /* urgency for requests that do not say theirs */
    bool incremental;
    unsigned long long looked; /* when its source was looked at last */
    const char *path; /* its source, and what that was when it was read */
    unsigned long long identity[5];
    PyObject *before, *after; /* words of the log, borrowed from `kept` */
    size_t cost;
    bool used;
} hot_answer;

extern PyType_Spec hot_table_spec;

/* How soon an answer is wanted; RFC 9218 section 4. */
typedef struct {
    uint8_t level;
    bool incremental;
} hot_urgency;

/* The capsule of the answer to a request with these names and values in turn,
 * and how soon that is wanted.  NULL when there is none, and with an error set
 * when memory is short.  Borrowed: the next call of any function or method of
 * the table may end it. */
PyObject *hot_find(hot_table *self, PyObject *const *fields, size_t count,
                   hot_urgency *urgency);

/* The answer in a capsule, which lives as long as that. */
hot_answer *hot_content(PyObject *capsule);

/* Begins a turn: sources are looked at anew. */
void hot_begin(hot_table *self);

/* The same, but goes on with the turn before if that was begun by this
 * function in the same round of the loop. */
void hot_begin_in_round(hot_table *self, long round);

/* Whether its source was as it is kept at some time in this turn; if not, the
 * table forgets the answer.  If so, that was of use. */
bool hot_confirm(hot_table *self, hot_answer *it);

/* Gives it the date of the moment. */
void hot_date(hot_table *self, hot_answer *it);

/* Nanoseconds of a clock that is never set. */
int64_t hot_now(void);

/* Writes the log record of an answer that took from `start` on, and of which
 * so many octets were sent; counts it as lost when there is no room. */
void hot_log(hot_table *self, const hot_answer *it, PyObject *client,
             int64_t start, size_t sent);

#endif
