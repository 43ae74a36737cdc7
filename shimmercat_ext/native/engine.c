/* HTTP/2 of one connection as a server sees it, by nghttp2.
 *
 * This is room 5's class Engine in C.  It cannot be told apart from that
 * room's Http2Engine by those who use it; tests/engines/test_differential.py
 * drives both with the same octets and lists where they may differ, and why.
 * The division of labour is room 5's as well: input is cut at frame borders
 * here, and what nghttp2 lets pass or takes for another error is looked at
 * before it gets a frame.  nghttp2 keeps the rules of streams, windows and
 * header compression; requests are checked here (no_http_messaging), and
 * GOAWAY is neither given to it nor taken from it, for it would end itself.
 *
 * A request that was answered before may be answered here, from hot.c's
 * table; of such a one our caller hears by `recalled` alone.  Its answer waits
 * until `serve` or `turn` finds it to be the most urgent one that the windows
 * let pass; `turn` moves the octets too, by wire.c, and `wake` is a turn that
 * the loop asks for.
 *
 * Whatever is submitted to nghttp2 is at once written to `out`, so that its
 * state is never behind ours, and the order of bytes is our caller's alone.
 *
 * Contract.  `bind` comes first.  The GIL is held throughout.  No Python
 * code runs while nghttp2 is on the stack: its callbacks make nothing but
 * bytes objects.  A garbage collection between two frames may run any code,
 * which finds `busy` set, and gets a RuntimeError.  After a failure of our
 * own (no memory, nghttp2 at odds with us) the engine is poisoned: every
 * call raises.  What a peer does never raises.
 */

#include "hot.h"
#include "wire.h"

#include <structmember.h>

#include <string.h>

/* Changes with all that shimmercat.py and this file say to each other. */
#define ABI 6

/* Limits; those of shimmercat.py's room 5. */
#define HEAD_BYTES 9
#define FRAME_BYTES 16384
/* NGHTTP2_FRAMEBUF_CHUNKLEN: where a session writes its frames. */
#define FRAME_BUFFER_BYTES (HEAD_BYTES + 1 + FRAME_BYTES)
#define MOST_CONTINUATIONS 32
#define MOST_CLOSED 512
#define MOST_SETTINGS (FRAME_BYTES / 6)
#define CRUMB_BYTES 1024
/* Each such turn goes to who waits longest, as in room 6. */
#define RESERVED_TURN 16
/* A level of urgency below all others. */
#define NO_LEVEL 8
/* Octets of an answer's frames besides its body, as a guess. */
#define HEAD_ROOM 256
/* Points that a peer may be ahead before somebody has to count them. */
#define UNJUDGED_POINTS 4096
#define NAME_BYTES 256
#define FIRST_WINDOW 65535
/* The connection's window in those of streams. */
#define WINDOWS 4
#define HIGHEST_STREAM 0x7fffffff
/* Room for an answer's fields on the stack; more of them are allocated. */
#define FEW_FIELDS 48

#define PRIORITY_UPDATE 0x10
#define NO_RFC7540_PRIORITIES 0x9
#define RESET_POINTS 10

/* Later than 1.52: used where the library has them, since their defaults are
 * stricter than ours.  Room 16 has the clock for such judgements. */
void nghttp2_option_set_stream_reset_rate_limit(nghttp2_option *, uint64_t,
                                                uint64_t)
    __attribute__((weak));
void nghttp2_option_set_max_continuations(nghttp2_option *, size_t)
    __attribute__((weak));
void nghttp2_option_set_glitch_rate_limit(nghttp2_option *, uint64_t, uint64_t)
    __attribute__((weak));

/* ------------------------------------------------------------------ types */

/* FAULT: the peer's, noted in the engine; BROKEN: a Python error is set. */
typedef enum { GOOD, FAULT, BROKEN } outcome;

/* How a stream was closed, which decides what later frames on it mean. */
typedef enum {
    ENDED,     /* both sides were through */
    TOLD,      /* one side reset it, and the peer is told again */
    OURS,      /* we gave it up: the peer may not know that yet */
    FORGOTTEN  /* never open, or too long ago */
} fate;

/* An open stream: the user data of nghttp2's. */
typedef struct stream {
    struct stream *before, *after;
    int32_t id;
    uint32_t prepaid; /* padding that nghttp2 took for consumed */
    int64_t owed;     /* octets of body that are due, -1 when unknown */
    bool headed;      /* the final response head was sent */
    bool answered;    /* the response is complete */
    bool complete;    /* the request is */
    fate fate;
    /* The ready answer that it waits for, with its capsule, owned, or NULL. */
    PyObject *capsule;
    hot_answer *answer;
    size_t sent;      /* octets of the body */
    int64_t since;    /* by hot_now */
    uint64_t turn;    /* the last one that it had */
    hot_urgency urgency;
    bool held;        /* its window lets nothing pass */
} stream;

typedef struct {
    int32_t id;
    fate fate;
} closed_stream;

typedef struct {
    uint8_t *octets;
    size_t used, room;
} buffer;

typedef struct {
    uint8_t kind, flags;
    int32_t stream;
    size_t length;
} frame_head;

/* Names of what `bind` got, in its order. */
enum {
    REQUEST_STARTED, REQUEST_REFUSED, BODY_RECEIVED, REQUEST_ENDED,
    STREAM_RESET, PRIORITY_CHANGED, PEER_LEAVING, PROTOCOL_FAULT, EVENTS
};

typedef struct {
    PyObject *type;             /* Http2Engine */
    PyObject *table;            /* HotTable */
    PyObject *events[EVENTS];   /* named tuples */
    PyObject *gone;             /* the exception StreamGone */
    PyObject *iteration;        /* the name of a loop's number */
    tls_library tls;            /* cleared where that is out of reach */
    uint8_t frame[FRAME_BUFFER_BYTES]; /* lent to all sessions */
} words;

typedef struct {
    PyObject_HEAD
    words *words; /* borrowed: the type keeps its module */
    nghttp2_session *session;
    int64_t header_bytes, header_count, streams;
    long long nuisance;
    long long judged;  /* what it was when our caller looked last */
    char closing;
    bool poisoned, busy, settled;
    bool borrows;      /* whether it has the module's frame buffer */
    size_t preface;    /* octets of it that are still due */
    buffer rest;       /* of a frame that is coming */
    buffer block;      /* frames of a header block that is coming */
    int fragments;     /* how many of them */
    PyObject *out;     /* bytes with room at its end, or NULL */
    size_t out_used;
    int32_t last;      /* highest stream that we take */
    int32_t highest;   /* highest that there was */
    stream *open;
    int64_t open_count;
    closed_stream *closed;   /* a ring, newest overwrites oldest */
    size_t closed_count, closed_next;
    int32_t *early;          /* idle streams that have a priority already */
    size_t early_count;
    uint64_t prepaid;        /* as in stream, for the connection */
    /* What nghttp2 said of the frame that it got last. */
    bool accepted, is_request;
    PyObject **fields;       /* names and values in turn, owned */
    size_t field_count, field_room;
    int64_t section;         /* octets of the fields; RFC 9113 6.5.2 */
    int32_t struck;          /* stream that it reset, 0 when none */
    uint32_t strike;         /* and with which code */
    /* What the connection ends with. */
    bool faulty;
    uint32_t fault_code;
    char fault_reason[80];
    bool resetting;          /* an RST_STREAM under way is of our will */
    const uint8_t *piece;    /* what `body` sends, borrowed */
    size_t piece_length;
    hot_table *table;        /* or NULL */
    PyObject *client;        /* its name in the log, bytes; with a table */
    int recalled;            /* newest stream that the table answers */
    int waiting;             /* streams with an answer of it */
    long long served;        /* octets of bodies out of it */
    uint64_t turns, queue_turn; /* turns of such; the last out of a queue */
    wire wire;
    char rests;              /* nothing is due until the peer says more */
    char stirred;            /* it said something, and all is at rest again */
} engine;

/* -------------------------------------------------- small helpers, no peer */

/* Numbers are big-endian; RFC 9113 section 1.3. */
static uint32_t read_u32(const uint8_t *octets)
{
    return (uint32_t)octets[0] << 24 | (uint32_t)octets[1] << 16 |
           (uint32_t)octets[2] << 8 | octets[3];
}

static void put_u32(uint8_t *octets, uint32_t value)
{
    octets[0] = (uint8_t)(value >> 24);
    octets[1] = (uint8_t)(value >> 16);
    octets[2] = (uint8_t)(value >> 8);
    octets[3] = (uint8_t)value;
}

/* Notes what the connection ends with, the first time only. */
static outcome fail(engine *self, uint32_t code, const char *reason)
{
    if (!self->faulty) {
        self->faulty = true;
        self->fault_code = code;
        PyOS_snprintf(self->fault_reason, sizeof(self->fault_reason), "%s",
                      reason);
    }
    return FAULT;
}

/* Sets the Python error for a result of nghttp2 that is no peer's doing. */
static outcome give_up(int result)
{
    if (PyErr_Occurred())
        return BROKEN;
    if (result == NGHTTP2_ERR_NOMEM)
        PyErr_NoMemory();
    else
        PyErr_Format(PyExc_RuntimeError, "nghttp2: %s",
                     nghttp2_strerror(result));
    return BROKEN;
}

/* Appends octets, a geometric growth at a time. */
static outcome extend(buffer *to, const uint8_t *octets, size_t count)
{
    if (to->used + count > to->room) {
        size_t room = 2 * to->room > to->used + count ? 2 * to->room
                                                      : to->used + count;
        uint8_t *grown = PyMem_Realloc(to->octets, room);
        if (grown == NULL) {
            PyErr_NoMemory();
            return BROKEN;
        }
        to->octets = grown;
        to->room = room;
    }
    if (count)
        memcpy(to->octets + to->used, octets, count);
    to->used += count;
    return GOOD;
}

/* An idle connection keeps no buffer: it is made anew when needed. */
static void release(buffer *it)
{
    PyMem_Free(it->octets);
    *it = (buffer){NULL, 0, 0};
}

/* Makes room for `count` octets at the end of the output. */
static outcome reserve_output(engine *self, size_t count)
{
    size_t wanted = self->out_used + count;
    size_t room = self->out ? (size_t)PyBytes_GET_SIZE(self->out) : 0;
    if (wanted <= room)
        return GOOD;
    room = 2 * room > wanted ? 2 * room : wanted < 256 ? 256 : wanted;
    if (self->out == NULL)
        self->out = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)room);
    else
        /* Frees the object and clears the pointer when it fails. */
        _PyBytes_Resize(&self->out, (Py_ssize_t)room);
    if (self->out == NULL)
        self->out_used = 0;
    return self->out ? GOOD : BROKEN;
}

/* Appends octets to the output. */
static outcome write_octets(engine *self, const uint8_t *octets, size_t count)
{
    if (reserve_output(self, count) != GOOD)
        return BROKEN;
    memcpy(PyBytes_AS_STRING(self->out) + self->out_used, octets, count);
    self->out_used += count;
    return GOOD;
}

/* Writes a frame that nghttp2 is not to know of. */
static outcome write_frame(engine *self, uint8_t kind, int32_t id,
                           const uint8_t *payload, size_t length)
{
    uint8_t head[HEAD_BYTES] = {0, (uint8_t)(length >> 8), (uint8_t)length,
                                kind, 0};
    put_u32(head + 5, (uint32_t)id);
    if (write_octets(self, head, HEAD_BYTES) != GOOD)
        return BROKEN;
    return write_octets(self, payload, length);
}

/* RST_STREAM for a stream that nghttp2 has forgotten. */
static outcome write_reset(engine *self, int32_t id, uint32_t code)
{
    uint8_t payload[4];
    put_u32(payload, code);
    return write_frame(self, NGHTTP2_RST_STREAM, id, payload, 4);
}

/* --------------------------------------------------------------- streams */

/* The open stream of a number, NULL when there is none; borrowed. */
static stream *find(engine *self, int32_t id)
{
    return nghttp2_session_get_stream_user_data(self->session, id);
}

/* Remembers how a stream was closed, of a bounded number. */
static outcome bury(engine *self, int32_t id, fate how)
{
    size_t count = self->closed_count;
    if (count < MOST_CLOSED && (count & (count - 1)) == 0) {
        size_t room = count ? 2 * count : 1;
        closed_stream *grown =
            PyMem_Realloc(self->closed, room * sizeof(closed_stream));
        if (grown == NULL) {
            PyErr_NoMemory();
            return BROKEN;
        }
        self->closed = grown;
    }
    self->closed[self->closed_next] = (closed_stream){id, how};
    self->closed_next = (self->closed_next + 1) % MOST_CLOSED;
    if (count < MOST_CLOSED)
        self->closed_count++;
    return GOOD;
}

/* How a stream that is not open was closed. */
static fate fate_of(engine *self, int32_t id)
{
    for (size_t n = 0; n < self->closed_count; n++)
        if (self->closed[n].id == id)
            return self->closed[n].fate;
    return FORGOTTEN;
}

/* Whether a client's stream was not opened so far; RFC 9113 5.1.1. */
static bool is_idle(engine *self, int32_t id)
{
    return id > self->highest || id % 2 == 0;
}

/* Gives nghttp2's newest stream a companion of ours. */
static stream *accompany(engine *self, int32_t id, bool complete)
{
    stream *it = PyMem_Calloc(1, sizeof(stream));
    if (it == NULL) {
        PyErr_NoMemory();
        return NULL;
    }
    it->id = id;
    it->owed = -1;
    it->complete = complete;
    it->after = self->open;
    if (self->open)
        self->open->before = it;
    self->open = it;
    self->open_count++;
    nghttp2_session_set_stream_user_data(self->session, id, it);
    return it;
}

/* Frees a companion; nghttp2 lets its stream go at the same time. */
static void part_from(engine *self, stream *it)
{
    if (it->before)
        it->before->after = it->after;
    else
        self->open = it->after;
    if (it->after)
        it->after->before = it->before;
    self->open_count--;
    self->waiting -= it->capsule != NULL;
    Py_XDECREF(it->capsule);
    PyMem_Free(it);
}

/* Accounts for a ready answer, sent or not. */
static void let_go(engine *self, stream *it)
{
    hot_log(self->table, it->answer, self->client, it->since, it->sent);
    self->waiting--;
    Py_CLEAR(it->capsule);
}

/* ------------------------------------------------- what nghttp2 calls back */

/* One more field of the block; its octets are ours to keep. */
static int on_header(nghttp2_session *session, const nghttp2_frame *frame,
                     const uint8_t *name, size_t name_length,
                     const uint8_t *value, size_t value_length, uint8_t flags,
                     void *user)
{
    engine *self = user;
    (void)session, (void)frame, (void)flags;
    self->section += (int64_t)(name_length + value_length + 32);
    if (self->section > 4 * self->header_bytes) {
        /* Decoding has to stop somewhere. */
        fail(self, NGHTTP2_ENHANCE_YOUR_CALM, "oversized header block");
        return NGHTTP2_ERR_CALLBACK_FAILURE;
    }
    if (2 * self->field_count == self->field_room) {
        size_t room = self->field_room ? 2 * self->field_room : 32;
        PyObject **grown =
            PyMem_Realloc(self->fields, room * sizeof(PyObject *));
        if (grown == NULL) {
            PyErr_NoMemory();
            return NGHTTP2_ERR_CALLBACK_FAILURE;
        }
        self->fields = grown;
        self->field_room = room;
    }
    PyObject *first =
        PyBytes_FromStringAndSize((const char *)name, (Py_ssize_t)name_length);
    PyObject *second = PyBytes_FromStringAndSize((const char *)value,
                                                 (Py_ssize_t)value_length);
    if (first == NULL || second == NULL) {
        Py_XDECREF(first);
        Py_XDECREF(second);
        return NGHTTP2_ERR_CALLBACK_FAILURE;
    }
    self->fields[2 * self->field_count] = first;
    self->fields[2 * self->field_count + 1] = second;
    self->field_count++;
    return 0;
}

/* A whole frame was good, and its stream not one that is to be ignored. */
static int on_frame(nghttp2_session *session, const nghttp2_frame *frame,
                    void *user)
{
    engine *self = user;
    (void)session;
    self->accepted = true;
    self->is_request = frame->hd.type == NGHTTP2_HEADERS &&
                       frame->headers.cat == NGHTTP2_HCAT_REQUEST;
    return 0;
}

/* Holds GOAWAY back, which is ours, and notes resets that are not. */
static int before_frame(nghttp2_session *session, const nghttp2_frame *frame,
                        void *user)
{
    engine *self = user;
    (void)session;
    if (frame->hd.type == NGHTTP2_GOAWAY) {
        const nghttp2_goaway *bye = &frame->goaway;
        char reason[sizeof(self->fault_reason)];
        PyOS_snprintf(reason, sizeof(reason), "%.*s",
                      (int)bye->opaque_data_len,
                      bye->opaque_data ? (const char *)bye->opaque_data : "");
        fail(self, bye->error_code, reason);
        return NGHTTP2_ERR_CANCEL;
    }
    if (frame->hd.type == NGHTTP2_RST_STREAM && !self->resetting) {
        stream *it = find(self, frame->hd.stream_id);
        self->struck = frame->hd.stream_id;
        self->strike = frame->rst_stream.error_code;
        if (it)
            it->fate = TOLD;
    }
    return 0;
}

/* A stream ended, by whatever frame, sent or received. */
static int on_close(nghttp2_session *session, int32_t id, uint32_t code,
                    void *user)
{
    engine *self = user;
    stream *it = find(self, id);
    (void)session, (void)code;
    if (it == NULL)
        return 0;
    fate how = it->fate;
    if (it->capsule)
        let_go(self, it);
    part_from(self, it);
    return bury(self, id, how) == GOOD ? 0 : NGHTTP2_ERR_CALLBACK_FAILURE;
}

/* Tells nghttp2 how long the next DATA frame is. */
static ssize_t offer_piece(nghttp2_session *session, int32_t id, uint8_t *to,
                           size_t most, uint32_t *flags,
                           nghttp2_data_source *source, void *user)
{
    engine *self = user;
    (void)session, (void)id, (void)to, (void)source;
    *flags |= NGHTTP2_DATA_FLAG_NO_COPY;
    if (self->piece_length > most)
        return (ssize_t)most;
    *flags |= NGHTTP2_DATA_FLAG_EOF;
    return (ssize_t)self->piece_length;
}

/* Writes that frame without a copy in between. */
static int write_piece(nghttp2_session *session, nghttp2_frame *frame,
                       const uint8_t *head, size_t length,
                       nghttp2_data_source *source, void *user)
{
    engine *self = user;
    (void)session, (void)frame, (void)source;
    if (reserve_output(self, HEAD_BYTES + length) != GOOD ||
        write_octets(self, head, HEAD_BYTES) != GOOD ||
        write_octets(self, self->piece, length) != GOOD)
        return NGHTTP2_ERR_CALLBACK_FAILURE;
    self->piece += length;
    self->piece_length -= length;
    return 0;
}

/* ------------------------------------------------ between nghttp2 and us */

/* Lets go of the fields of the last block. */
static void drop_fields(engine *self)
{
    for (size_t n = 0; n < 2 * self->field_count; n++)
        Py_DECREF(self->fields[n]);
    self->field_count = 0;
    self->section = 0;
}

/* Moves what nghttp2 wants to say into the output. */
static outcome pump(engine *self)
{
    for (;;) {
        const uint8_t *octets;
        ssize_t count = nghttp2_session_mem_send(self->session, &octets);
        if (count < 0)
            return give_up((int)count);
        if (count == 0)
            return self->faulty ? FAULT : GOOD;
        if (write_octets(self, octets, (size_t)count) != GOOD)
            return BROKEN;
    }
}

/* Has nghttp2 take whole frames. */
static outcome feed(engine *self, const uint8_t *octets, size_t count)
{
    drop_fields(self);
    self->accepted = self->is_request = false;
    self->struck = 0;
    ssize_t result = nghttp2_session_mem_recv(self->session, octets, count);
    if (self->faulty)
        return FAULT;
    if (result == NGHTTP2_ERR_FLOODED)
        return fail(self, NGHTTP2_ENHANCE_YOUR_CALM, "flooded");
    if (result < 0)
        return give_up((int)result);
    return pump(self);
}

/* As `feed`; a reset of nghttp2's is a fault, as room 5 has it. */
static outcome feed_strictly(engine *self, const uint8_t *octets, size_t count)
{
    outcome result = feed(self, octets, count);
    if (result == GOOD && self->struck)
        return fail(self, self->strike, "beyond its window");
    return result;
}

/* ---------------------------------------------------------------- events */

/* Appends a named tuple; steals the values, of which some may be NULL. */
static outcome report(engine *self, PyObject *events, int name, int count,
                      PyObject **values)
{
    PyTypeObject *kind = (PyTypeObject *)self->words->events[name];
    PyObject *event = NULL;
    int failed = 0;
    for (int n = 0; n < count; n++)
        failed |= values[n] == NULL;
    if (!failed)
        event = kind->tp_alloc(kind, count);
    for (int n = 0; n < count; n++) {
        if (event)
            PyTuple_SET_ITEM(event, n, values[n]);
        else
            Py_XDECREF(values[n]);
    }
    if (event == NULL)
        return BROKEN;
    failed = PyList_Append(events, event);
    Py_DECREF(event);
    return failed ? BROKEN : GOOD;
}

/* The event of a stream and a number. */
static outcome report_numbers(engine *self, PyObject *events, int name,
                              int32_t id, uint32_t number)
{
    PyObject *values[] = {PyLong_FromLong(id),
                          PyLong_FromUnsignedLong(number)};
    return report(self, events, name, 2, values);
}

/* The fields as a list of pairs; a new reference. */
static PyObject *listed_fields(engine *self)
{
    PyObject *list = PyList_New((Py_ssize_t)self->field_count);
    for (size_t n = 0; list && n < self->field_count; n++) {
        PyObject *pair =
            PyTuple_Pack(2, self->fields[2 * n], self->fields[2 * n + 1]);
        if (pair == NULL)
            Py_CLEAR(list);
        else
            PyList_SET_ITEM(list, (Py_ssize_t)n, pair);
    }
    return list;
}

/* Reports a request's end; steals the trailers, a list or NULL. */
static outcome report_end(engine *self, PyObject *events, int32_t id,
                          PyObject *trailers)
{
    PyObject *values[] = {PyLong_FromLong(id),
                          trailers ? PyList_AsTuple(trailers) : NULL};
    Py_XDECREF(trailers);
    return report(self, events, REQUEST_ENDED, 2, values);
}

/* --------------------------------------------------- giving streams up */

/* Sends RST_STREAM; `how` is what later frames on the stream meet. */
static outcome cut_off(engine *self, stream *it, uint32_t code, fate how)
{
    it->fate = how;
    int result = nghttp2_submit_rst_stream(self->session, NGHTTP2_FLAG_NONE,
                                           it->id, code);
    if (result)
        return give_up(result);
    self->resetting = true;
    outcome sent = pump(self);
    self->resetting = false;
    return sent;
}

/* Gives a stream up; one that is closed is left alone. */
static outcome reset_stream(engine *self, int32_t id, uint32_t code)
{
    stream *it = find(self, id);
    return it ? cut_off(self, it, code, OURS) : GOOD;
}

/* Resets a stream, at the cost of who made us (CVE-2025-8671). */
static outcome refuse(engine *self, int32_t id, uint32_t code)
{
    self->nuisance += RESET_POINTS;
    return reset_stream(self, id, code);
}

/* As refuse, for a stream that our caller knows. */
static outcome refuse_aloud(engine *self, PyObject *events, int32_t id,
                            uint32_t code)
{
    outcome result = refuse(self, id, code);
    if (result != GOOD)
        return result;
    return report_numbers(self, events, STREAM_RESET, id, code);
}

/* A frame came on a stream whose request is complete: RFC 9113 5.1. */
static outcome strike_complete(engine *self, PyObject *events, stream *it)
{
    int32_t id = it->id;
    self->nuisance += RESET_POINTS;
    outcome result = cut_off(self, it, NGHTTP2_STREAM_CLOSED, TOLD);
    if (result != GOOD)
        return result;
    return report_numbers(self, events, STREAM_RESET, id,
                          NGHTTP2_STREAM_CLOSED);
}

/* ---------------------------------------------- checks of fields: RFC 9113 */

/* 8.2.1: tokens have no upper-case letters here. */
static bool is_name_octet(uint8_t octet)
{
    if ((octet >= 'a' && octet <= 'z') || (octet >= '0' && octet <= '9'))
        return true;
    return octet && strchr("!#$%&'*+-.^_`|~", octet) != NULL;
}

/* 8.2.1: no control octets, no white space at the ends. */
static bool is_odd_value(PyObject *value)
{
    const char *octets = PyBytes_AS_STRING(value);
    size_t length = (size_t)PyBytes_GET_SIZE(value);
    if (length == 0)
        return false;
    for (size_t n = 0; n < length; n++)
        if (((uint8_t)octets[n] < ' ' && octets[n] != '\t') ||
            octets[n] == 0x7f)
            return true;
    char first = octets[0], last = octets[length - 1];
    return first == ' ' || first == '\t' || last == ' ' || last == '\t';
}

/* Whether a name or value is this text. */
static bool is_text(PyObject *bytes, const char *text)
{
    size_t length = strlen(text);
    return (size_t)PyBytes_GET_SIZE(bytes) == length &&
           memcmp(PyBytes_AS_STRING(bytes), text, length) == 0;
}

/* Whether two values are the same but for the case of ASCII letters. */
static bool is_same_text(const char *one, size_t length, PyObject *other)
{
    return (size_t)PyBytes_GET_SIZE(other) == length &&
           PyOS_mystrnicmp(one, PyBytes_AS_STRING(other),
                           (Py_ssize_t)length) == 0;
}

/* 8.2.2: what concerns the connection has no place in a request. */
static bool is_connection_field(PyObject *name)
{
    static const char *const names[] = {
        "connection", "keep-alive", "proxy-connection", "transfer-encoding",
        "upgrade"};
    for (size_t n = 0; n < sizeof(names) / sizeof(*names); n++)
        if (is_text(name, names[n]))
            return true;
    return false;
}

/* Whether one field breaks section 8.2. */
static bool is_odd_field(PyObject *name, PyObject *value)
{
    const uint8_t *octets = (const uint8_t *)PyBytes_AS_STRING(name);
    Py_ssize_t length = PyBytes_GET_SIZE(name);
    if (length == 0 || length > NAME_BYTES)
        return true;
    for (Py_ssize_t n = 0; n < length; n++)
        if (!is_name_octet(octets[n]))
            return true;
    if (is_connection_field(name) || is_odd_value(value))
        return true;
    return is_text(name, "te") && !is_same_text("trailers", 8, value);
}

/* Whether one of the fields from `from` on does. */
static bool has_odd_field(engine *self, size_t from)
{
    for (size_t n = from; n < self->field_count; n++)
        if (is_odd_field(self->fields[2 * n], self->fields[2 * n + 1]))
            return true;
    return false;
}

enum { METHOD, SCHEME, AUTHORITY, PATH, PROTOCOL, PSEUDO };

/* Finds the pseudo-fields, which come first; -1 when one is odd. */
static int split_pseudo(engine *self, PyObject **pseudo)
{
    static const char *const names[PSEUDO] = {
        ":method", ":scheme", ":authority", ":path", ":protocol"};
    size_t count = 0;
    for (; count < self->field_count; count++) {
        PyObject *name = self->fields[2 * count];
        int which = 0;
        if (PyBytes_AS_STRING(name)[0] != ':')
            break;
        while (which < PSEUDO && !is_text(name, names[which]))
            which++;
        if (which == PSEUDO || pseudo[which] ||
            is_odd_value(self->fields[2 * count + 1]))
            return -1;
        pseudo[which] = self->fields[2 * count + 1];
    }
    return (int)count;
}

/* Whether a Host field says something else than :authority; 8.3.1. */
static bool contradicts(engine *self, int from, PyObject *authority)
{
    for (size_t n = (size_t)from; n < self->field_count; n++) {
        PyObject *value = self->fields[2 * n + 1];
        if (is_text(self->fields[2 * n], "host") &&
            !is_same_text(PyBytes_AS_STRING(value),
                          (size_t)PyBytes_GET_SIZE(value), authority))
            return true;
    }
    return false;
}

/* Whether a pseudo-field is missing or says nothing. */
static bool is_blank(PyObject *value)
{
    return value == NULL || PyBytes_GET_SIZE(value) == 0;
}

/* Sections 8.2, 8.3 and 8.5, as room 4's is_malformed. */
static bool is_malformed(engine *self)
{
    PyObject *pseudo[PSEUDO] = {NULL};
    int count = split_pseudo(self, pseudo);
    if (count < 0 || has_odd_field(self, (size_t)count))
        return true;
    bool connects = pseudo[METHOD] && is_text(pseudo[METHOD], "CONNECT");
    if (connects && pseudo[PROTOCOL] == NULL)
        return pseudo[AUTHORITY] == NULL || count > 2;
    /* RFC 8441 section 4 */
    if (pseudo[PROTOCOL] &&
        (!connects || is_blank(pseudo[PROTOCOL]) ||
         is_blank(pseudo[AUTHORITY])))
        return true;
    if (is_blank(pseudo[METHOD]) || is_blank(pseudo[SCHEME]) ||
        is_blank(pseudo[PATH]))
        return true;
    return pseudo[AUTHORITY] && contradicts(self, count, pseudo[AUTHORITY]);
}

/* The number that a content-length field means, -1 when it is none. */
static int64_t length_of(PyObject *value)
{
    const char *octets = PyBytes_AS_STRING(value);
    Py_ssize_t count = PyBytes_GET_SIZE(value);
    int64_t length = 0;
    if (count == 0)
        return -1;
    for (Py_ssize_t n = 0; n < count; n++) {
        if (octets[n] < '0' || octets[n] > '9' || length > INT64_MAX / 10 - 1)
            return -1;
        length = 10 * length + (octets[n] - '0');
    }
    return length;
}

/* Whether body and content-length can agree; 8.1.1. */
static bool owes(engine *self, stream *it)
{
    for (size_t n = 0; n < self->field_count; n++) {
        if (!is_text(self->fields[2 * n], "content-length"))
            continue;
        int64_t length = length_of(self->fields[2 * n + 1]);
        if (length < 0 || (it->owed >= 0 && length != it->owed) ||
            (it->complete && length > 0))
            return false;
        it->owed = length;
    }
    return true;
}

/* ------------------------------------------------- answers that are ready */

/* Whether a stream got its priority ahead of its request. */
static bool came_early(engine *self, int32_t id)
{
    for (size_t n = 0; n < self->early_count; n++)
        if (self->early[n] == id)
            return true;
    return false;
}

static int32_t room_of(engine *self, int32_t id);

/* Whether one of two answers comes before the other: room 6's order. */
static bool precedes(const engine *self, const stream *it,
                     const stream *other)
{
    bool is_reserved = self->turns % RESERVED_TURN == RESERVED_TURN - 1;
    uint64_t turn = it->turn, others = other->turn;
    if (!is_reserved && it->urgency.level != other->urgency.level)
        return it->urgency.level < other->urgency.level;
    if (!is_reserved && !it->urgency.incremental)
        turn = self->queue_turn;
    if (!is_reserved && !other->urgency.incremental)
        others = self->queue_turn;
    return turn != others ? turn < others : it->id < other->id;
}

/* The stream whose answer is next, NULL when none can be sent. */
static stream *next_waiting(engine *self)
{
    for (;;) {
        stream *best = NULL;
        for (stream *it = self->open; it; it = it->after)
            if (it->capsule && !it->held &&
                (best == NULL || precedes(self, it, best)))
                best = it;
        if (best == NULL || room_of(self, best->id))
            return best;
        best->held = true;
    }
}

/* Writes the head of an answer, and with `whole` its body, in `piece`. */
static outcome send_ready(engine *self, const stream *it, bool whole)
{
    nghttp2_data_provider provider = {{0}, offer_piece};
    const hot_answer *answer = it->answer;
    hot_date(self->table, it->answer);
    int result = whole ? nghttp2_submit_response(
                             self->session, it->id, answer->fields,
                             answer->field_count, &provider)
                       : nghttp2_submit_headers(
                             self->session, NGHTTP2_FLAG_NONE, it->id, NULL,
                             answer->fields, answer->field_count, NULL);
    return result < 0 ? give_up(result) : pump(self);
}

/* Writes the next octets of an answer, so many; at its end `it` is gone. */
static outcome serve_piece(engine *self, stream *it, size_t count)
{
    nghttp2_data_provider provider = {{0}, offer_piece};
    bool begins = it->sent == 0, whole = count == it->answer->length;
    bool ends = it->sent + count == it->answer->length;
    int32_t id = it->id;
    outcome result = GOOD;
    PyObject *capsule = Py_NewRef(it->capsule);
    self->nuisance -= 2 * (long long)(
        count / FRAME_BYTES + (count % FRAME_BYTES >= CRUMB_BYTES));
    self->turns++;
    it->turn = self->turns;
    if (!it->urgency.incremental)
        self->queue_turn = self->turns;
    it->headed = true;
    it->answered = ends;
    if (begins && !whole)
        result = send_ready(self, it, false);
    self->piece = it->answer->body + it->sent;
    self->piece_length = count;
    it->sent += count;
    if (result == GOOD && whole) {
        result = send_ready(self, it, true);
    } else if (result == GOOD) {
        int error = nghttp2_submit_data(
            self->session, ends ? NGHTTP2_FLAG_END_STREAM : NGHTTP2_FLAG_NONE,
            id, &provider);
        result = error ? give_up(error) : pump(self);
    }
    if (result == GOOD && self->piece_length)
        result = give_up(NGHTTP2_ERR_INVALID_STATE);
    self->piece = NULL;
    self->piece_length = 0;
    Py_DECREF(capsule);
    return result;
}

/* Writes up to about `most` octets of the answers that wait. */
static outcome serve(engine *self, size_t most, size_t *served)
{
    size_t sum = 0;
    *served = 0;
    for (stream *it = self->waiting ? self->open : NULL; it; it = it->after) {
        it->held = false;
        if (it->capsule && sum < most)
            sum += it->answer->length - it->sent + HEAD_ROOM;
    }
    if (sum && reserve_output(self, sum < most ? sum : most) != GOOD)
        return BROKEN;
    while (self->waiting && *served < most && !self->faulty) {
        stream *it = next_waiting(self);
        if (it == NULL)
            break;
        size_t left = it->answer->length - it->sent;
        size_t room = (size_t)room_of(self, it->id);
        size_t count = left < room ? left : room;
        if (count > FRAME_BYTES)
            count = FRAME_BYTES;
        outcome result = serve_piece(self, it, count);
        if (result != GOOD)
            return result;
        *served += count;
        self->served += (long long)count;
    }
    return GOOD;
}

/* Has a complete request wait for its answer in the hot table, if that is
 * there. */
static outcome recall(engine *self, stream *it, bool *done)
{
    if (self->table == NULL || came_early(self, it->id))
        return GOOD;
    int64_t start = hot_now();
    PyObject *capsule = hot_find(self->table, self->fields, self->field_count,
                                 &it->urgency);
    if (capsule == NULL)
        return PyErr_Occurred() ? BROKEN : GOOD;
    if (!hot_confirm(self->table, hot_content(capsule)))
        return GOOD;
    it->capsule = Py_NewRef(capsule);
    it->answer = hot_content(capsule);
    it->since = start;
    it->turn = self->turns;
    self->waiting++;
    self->recalled = it->id;
    *done = true;
    return GOOD;
}

/* --------------------------------------------- frames, one by one: heads */

/* A new stream: looks at what it asks for, in room 5's order. */
static outcome take_request(engine *self, PyObject *events, int32_t id,
                            bool complete)
{
    stream *it = accompany(self, id, complete);
    if (it == NULL)
        return BROKEN;
    self->highest = id;
    if (id > self->last)
        return reset_stream(self, id, NGHTTP2_REFUSED_STREAM);
    if (self->open_count > self->streams)
        return refuse(self, id, NGHTTP2_REFUSED_STREAM);
    if (is_malformed(self) || !owes(self, it))
        return refuse(self, id, NGHTTP2_PROTOCOL_ERROR);
    if (self->section > self->header_bytes ||
        (int64_t)self->field_count > self->header_count)
        return report_numbers(self, events, REQUEST_REFUSED, id, 431);
    bool done = false;
    outcome result = complete ? recall(self, it, &done) : GOOD;
    if (result != GOOD || done)
        return result;
    PyObject *values[] = {PyLong_FromLong(id), listed_fields(self),
                          PyBool_FromLong(complete)};
    return report(self, events, REQUEST_STARTED, 3, values);
}

/* A second block on a stream: it ends the request. */
static outcome take_trailers(engine *self, PyObject *events, int32_t id,
                             bool ended, int64_t owed)
{
    if (!ended)
        return fail(self, NGHTTP2_PROTOCOL_ERROR,
                    "trailers do not end the stream");
    if (owed > 0 || has_odd_field(self, 0))
        return refuse_aloud(self, events, id, NGHTTP2_PROTOCOL_ERROR);
    return report_end(self, events, id, listed_fields(self));
}

/* Answers a frame on a closed stream; RFC 9113 section 5.1. */
static outcome take_late(engine *self, int32_t id, bool is_data)
{
    fate how = fate_of(self, id);
    if (how == OURS)
        return GOOD;
    if (how == TOLD || is_data)
        return write_reset(self, id, NGHTTP2_STREAM_CLOSED);
    if (how == ENDED)
        return fail(self, NGHTTP2_STREAM_CLOSED, "the stream has ended");
    return fail(self, NGHTTP2_PROTOCOL_ERROR, "the stream is closed");
}

/* Takes a header block, all of its frames together. */
static outcome take_block(engine *self, PyObject *events,
                          const uint8_t *frames, size_t count)
{
    int32_t id = (int32_t)(read_u32(frames + 5) & HIGHEST_STREAM);
    bool ended = frames[4] & NGHTTP2_FLAG_END_STREAM;
    stream *it = find(self, id);
    int64_t owed = it ? it->owed : -1;
    bool is_late = id % 2 && id <= self->highest && it == NULL;
    outcome result = GOOD;
    if (it && it->complete)
        result = strike_complete(self, events, it);
    else if (it && ended)
        it->complete = true;
    if (result == GOOD)
        result = feed_strictly(self, frames, count);
    if (result != GOOD)
        return result;
    if (is_late)
        return take_late(self, id, false);
    if (!self->accepted)
        return GOOD;
    if (self->is_request)
        return take_request(self, events, id, ended);
    return take_trailers(self, events, id, ended, owed);
}

/* Keeps a frame of a header block until the block is complete. */
static outcome continue_block(engine *self, PyObject *events,
                              const uint8_t *frame, const frame_head *head)
{
    self->fragments++;
    int64_t length = (int64_t)(self->block.used + head->length) -
                     HEAD_BYTES * (self->fragments - 1);
    if (length > 2 * self->header_bytes ||
        self->fragments > MOST_CONTINUATIONS)
        return fail(self, NGHTTP2_ENHANCE_YOUR_CALM, "header block too long");
    if (head->kind != NGHTTP2_CONTINUATION ||
        head->stream !=
            (int32_t)(read_u32(self->block.octets + 5) & HIGHEST_STREAM))
        return fail(self, NGHTTP2_PROTOCOL_ERROR, "CONTINUATION is due");
    outcome result =
        extend(&self->block, frame, HEAD_BYTES + head->length);
    if (result != GOOD || !(head->flags & NGHTTP2_FLAG_END_HEADERS))
        return result;
    result = take_block(self, events, self->block.octets, self->block.used);
    release(&self->block);
    return result;
}

/* Whether HEADERS name their own stream as the one that they depend on. */
static bool depends_on_itself(const uint8_t *frame, int32_t id)
{
    size_t at = HEAD_BYTES + (frame[4] & NGHTTP2_FLAG_PADDED ? 1 : 0);
    return frame[4] & NGHTTP2_FLAG_PRIORITY &&
           (int32_t)(read_u32(frame + at) & HIGHEST_STREAM) == id;
}

/* HEADERS are fed when their block is complete, as one. */
static outcome take_headers(engine *self, PyObject *events,
                            const uint8_t *frame, const frame_head *head)
{
    if (!head->stream)
        return fail(self, NGHTTP2_PROTOCOL_ERROR, "HEADERS without a stream");
    if (depends_on_itself(frame, head->stream))
        /* RFC 7540 section 5.3.1 */
        return fail(self, NGHTTP2_PROTOCOL_ERROR, "it depends on itself");
    if (head->flags & NGHTTP2_FLAG_END_HEADERS)
        return take_block(self, events, frame, HEAD_BYTES + head->length);
    self->fragments = 1;
    return extend(&self->block, frame, HEAD_BYTES + head->length);
}

/* ------------------------------------------------- frames: bodies, resets */

static outcome give_window(engine *self, int32_t id, uint64_t count);

/* Resets a stream whose body is not as long as it said. */
static outcome weigh(engine *self, PyObject *events, stream *it,
                     int64_t content, bool ended)
{
    if (it == NULL || it->complete || it->owed < 0)
        return GOOD;
    it->owed -= content;
    if (it->owed >= 0 && !(it->owed && ended))
        return GOOD;
    return refuse_aloud(self, events, it->id, NGHTTP2_PROTOCOL_ERROR);
}

/* `cost` is what the frame took of the windows, padding included. */
static outcome report_body(engine *self, PyObject *events,
                           const frame_head *head, const uint8_t *content,
                           size_t length)
{
    PyObject *values[] = {
        PyLong_FromLong(head->stream),
        PyBytes_FromStringAndSize((const char *)content, (Py_ssize_t)length),
        PyLong_FromSize_t(head->length)};
    return report(self, events, BODY_RECEIVED, 3, values);
}

/* Takes DATA for a stream that is open and waits for it. */
static outcome take_content(engine *self, PyObject *events,
                            const uint8_t *frame, const frame_head *head)
{
    bool ended = head->flags & NGHTTP2_FLAG_END_STREAM;
    bool padded = head->flags & NGHTTP2_FLAG_PADDED && head->length;
    uint32_t padding = padded ? 1u + frame[HEAD_BYTES] : 0;
    stream *it = find(self, head->stream);
    it->complete = ended;
    it->prepaid += padding;
    self->prepaid += padding;
    outcome result = feed_strictly(self, frame, HEAD_BYTES + head->length);
    if (result != GOOD || !self->accepted)
        return result;
    if (head->length > padding)
        result = report_body(self, events, head, frame + HEAD_BYTES + padded,
                             head->length - padding);
    else if (padding)
        result = give_window(self, head->stream, padding);
    if (result != GOOD || !ended)
        return result;
    return report_end(self, events, head->stream, PyList_New(0));
}

/* DATA in any state of its stream. */
static outcome take_data(engine *self, PyObject *events, const uint8_t *frame,
                         const frame_head *head)
{
    bool ended = head->flags & NGHTTP2_FLAG_END_STREAM;
    bool padded = head->flags & NGHTTP2_FLAG_PADDED && head->length;
    int64_t content =
        (int64_t)head->length - (padded ? 1 + frame[HEAD_BYTES] : 0);
    if (content < 0)
        /* RFC 9113 section 6.1 */
        return fail(self, NGHTTP2_PROTOCOL_ERROR, "padding beyond its frame");
    self->nuisance += content == 0 && !ended;
    stream *it = find(self, head->stream);
    bool is_late = it == NULL && !is_idle(self, head->stream);
    outcome result = weigh(self, events, it, content, ended);
    it = find(self, head->stream);
    if (result == GOOD && it && it->complete)
        result = strike_complete(self, events, it);
    else if (result == GOOD && it)
        return take_content(self, events, frame, head);
    /* nghttp2 gives the connection its window back. */
    if (result == GOOD)
        result = feed_strictly(self, frame, HEAD_BYTES + head->length);
    if (result == GOOD && is_late)
        result = take_late(self, head->stream, true);
    return result;
}

/* RST_STREAM: the peer gave a stream up. */
static outcome take_reset(engine *self, PyObject *events, const uint8_t *frame,
                          const frame_head *head)
{
    stream *it = find(self, head->stream);
    if (head->stream && is_idle(self, head->stream))
        return fail(self, NGHTTP2_PROTOCOL_ERROR, "RST_STREAM when idle");
    if (it)
        it->fate = TOLD;
    outcome result = feed_strictly(self, frame, HEAD_BYTES + head->length);
    if (result != GOOD || it == NULL)
        return result;
    return report_numbers(self, events, STREAM_RESET, head->stream,
                          read_u32(frame + HEAD_BYTES));
}

/* WINDOW_UPDATE: one that overflows costs its stream, or all. */
static outcome take_window(engine *self, PyObject *events,
                           const uint8_t *frame, const frame_head *head)
{
    if ((read_u32(frame + HEAD_BYTES) & HIGHEST_STREAM) == 0)
        return fail(self, NGHTTP2_PROTOCOL_ERROR, "an increment of nothing");
    outcome result = feed(self, frame, HEAD_BYTES + head->length);
    if (result != GOOD || !self->struck)
        return result;
    self->nuisance += RESET_POINTS;
    return report_numbers(self, events, STREAM_RESET, self->struck,
                          self->strike);
}

/* ------------------------------------------- frames: of the connection */

/* RFC 9113 section 6.3: checked, for what it says is deprecated. */
static outcome take_priority(engine *self, PyObject *events,
                             const uint8_t *frame, const frame_head *head)
{
    (void)frame;
    if (!head->stream)
        return fail(self, NGHTTP2_PROTOCOL_ERROR, "PRIORITY without a stream");
    if (head->length == 5)
        return GOOD;
    if (head->stream > self->highest)
        return fail(self, NGHTTP2_FRAME_SIZE_ERROR, "a frame's length");
    return refuse_aloud(self, events, head->stream, NGHTTP2_FRAME_SIZE_ERROR);
}

/* nghttp2's part of the preface, and the ACK that it waits for: ours count
 * from the beginning, and the peer's comes when it likes. */
static outcome begin_session(engine *self, const uint8_t *frame, size_t count)
{
    static const uint8_t ack[HEAD_BYTES] = {0, 0, 0, NGHTTP2_SETTINGS,
                                            NGHTTP2_FLAG_ACK};
    outcome result =
        feed(self, (const uint8_t *)NGHTTP2_CLIENT_MAGIC,
             NGHTTP2_CLIENT_MAGIC_LEN);
    if (result == GOOD)
        result = feed(self, frame, count);
    if (result == GOOD)
        result = feed(self, ack, HEAD_BYTES);
    return result;
}

/* SETTINGS: the first begins all, an ACK is no news. */
static outcome take_settings(engine *self, PyObject *events,
                             const uint8_t *frame, const frame_head *head)
{
    size_t count = HEAD_BYTES + head->length;
    bool is_first = !self->settled;
    (void)events;
    self->settled = true;
    if (head->flags & NGHTTP2_FLAG_ACK)
        return head->stream ? fail(self, NGHTTP2_PROTOCOL_ERROR,
                                   "SETTINGS on a stream")
                            : GOOD;
    return is_first ? begin_session(self, frame, count)
                    : feed_strictly(self, frame, count);
}

/* RFC 9113 section 6.8; not for nghttp2, which would end itself. */
static outcome take_goaway(engine *self, PyObject *events,
                           const uint8_t *frame, const frame_head *head)
{
    if (head->stream)
        return fail(self, NGHTTP2_PROTOCOL_ERROR, "GOAWAY on a stream");
    if (head->length < 8)
        return fail(self, NGHTTP2_FRAME_SIZE_ERROR, "GOAWAY cut short");
    PyObject *code =
        PyLong_FromUnsignedLong(read_u32(frame + HEAD_BYTES + 4));
    return report(self, events, PEER_LEAVING, 1, &code);
}

/* Counts an idle stream that has a priority, those still idle only. */
static outcome note_early(engine *self, int32_t id)
{
    size_t kept = 0;
    for (size_t n = 0; n < self->early_count; n++)
        if (self->early[n] > self->highest && self->early[n] != id)
            self->early[kept++] = self->early[n];
    int32_t *grown =
        PyMem_Realloc(self->early, (kept + 1) * sizeof(int32_t));
    if (grown == NULL) {
        PyErr_NoMemory();
        return BROKEN;
    }
    self->early = grown;
    self->early[kept++] = id;
    self->early_count = kept;
    if ((int64_t)kept + self->open_count > self->streams)
        return fail(self, NGHTTP2_PROTOCOL_ERROR, "too many streams");
    return GOOD;
}

/* RFC 9218 section 7.1. */
static outcome take_priority_update(engine *self, PyObject *events,
                                    const uint8_t *frame,
                                    const frame_head *head)
{
    if (head->length < 4)
        return fail(self, NGHTTP2_FRAME_SIZE_ERROR, "no prioritized stream");
    const uint8_t *payload = frame + HEAD_BYTES;
    int32_t target = (int32_t)(read_u32(payload) & HIGHEST_STREAM);
    if (head->stream || target % 2 == 0)
        return fail(self, NGHTTP2_PROTOCOL_ERROR, "PRIORITY_UPDATE misplaced");
    if (target > self->highest) {
        outcome result = note_early(self, target);
        if (result != GOOD)
            return result;
    }
    PyObject *values[] = {
        PyLong_FromLong(target),
        PyBytes_FromStringAndSize((const char *)payload + 4,
                                  (Py_ssize_t)head->length - 4)};
    return report(self, events, PRIORITY_CHANGED, 2, values);
}

/* -------------------------------------------------------- cutting of input */

/* Points that a frame costs its sender. */
static int points_of(uint8_t kind)
{
    switch (kind) {
    case NGHTTP2_DATA:
    case NGHTTP2_HEADERS:
        return 0;
    case NGHTTP2_RST_STREAM:
        return RESET_POINTS;
    case NGHTTP2_SETTINGS:
        return 5;
    case NGHTTP2_PING:
        return 2;
    default:
        return 1;
    }
}

/* Payload octets of the frames that have a fixed size, else -1. */
static int size_of(const frame_head *head)
{
    switch (head->kind) {
    case NGHTTP2_RST_STREAM:
    case NGHTTP2_WINDOW_UPDATE:
        return 4;
    case NGHTTP2_PING:
        return 8;
    case NGHTTP2_SETTINGS:
        return head->flags & NGHTTP2_FLAG_ACK ? 0 : -1;
    default:
        return -1;
    }
}

/* Whether a frame is too short for what its flags promise; section 4.2. */
static bool is_cut_short(const frame_head *head)
{
    size_t least = 0;
    if (head->kind != NGHTTP2_DATA && head->kind != NGHTTP2_HEADERS)
        return false;
    if (head->flags & NGHTTP2_FLAG_PADDED)
        least += 1;
    if (head->kind == NGHTTP2_HEADERS && head->flags & NGHTTP2_FLAG_PRIORITY)
        least += 5;
    return head->length < least;
}

/* One whole frame: counted, looked at, and passed to its function. */
static outcome take_frame(engine *self, PyObject *events, const uint8_t *frame,
                          const frame_head *head)
{
    if (self->block.used)
        return continue_block(self, events, frame, head);
    self->nuisance += points_of(head->kind);
    if (!self->settled && (head->kind != NGHTTP2_SETTINGS ||
                           head->flags & NGHTTP2_FLAG_ACK))
        /* RFC 9113 section 3.4 */
        return fail(self, NGHTTP2_PROTOCOL_ERROR,
                    "no SETTINGS to begin with");
    if (head->kind == NGHTTP2_PUSH_PROMISE ||
        head->kind == NGHTTP2_CONTINUATION)
        /* RFC 9113 sections 8.4 and 6.10 */
        return fail(self, NGHTTP2_PROTOCOL_ERROR, "no such frame is due");
    int size = size_of(head);
    if ((size >= 0 && head->length != (size_t)size) || is_cut_short(head))
        return fail(self, NGHTTP2_FRAME_SIZE_ERROR, "a frame's length");
    switch (head->kind) {
    case NGHTTP2_DATA:
        return take_data(self, events, frame, head);
    case NGHTTP2_HEADERS:
        return take_headers(self, events, frame, head);
    case NGHTTP2_PRIORITY:
        return take_priority(self, events, frame, head);
    case NGHTTP2_RST_STREAM:
        return take_reset(self, events, frame, head);
    case NGHTTP2_SETTINGS:
        return take_settings(self, events, frame, head);
    case NGHTTP2_GOAWAY:
        return take_goaway(self, events, frame, head);
    case NGHTTP2_WINDOW_UPDATE:
        return take_window(self, events, frame, head);
    case PRIORITY_UPDATE:
        return take_priority_update(self, events, frame, head);
    case NGHTTP2_PING:
        return feed_strictly(self, frame, HEAD_BYTES + head->length);
    default:
        /* RFC 9113 section 4.1 */
        return GOOD;
    }
}

/* Takes all complete frames; `*taken` octets belong to them. */
static outcome take_frames(engine *self, PyObject *events,
                           const uint8_t *octets, size_t count, size_t *taken)
{
    outcome result = GOOD;
    while (result == GOOD && count - *taken >= HEAD_BYTES) {
        const uint8_t *at = octets + *taken;
        frame_head head = {
            .kind = at[3], .flags = at[4],
            .stream = (int32_t)(read_u32(at + 5) & HIGHEST_STREAM),
            .length = (size_t)at[0] << 16 | (size_t)at[1] << 8 | at[2]};
        if (head.length > FRAME_BYTES)
            return fail(self, NGHTTP2_FRAME_SIZE_ERROR,
                        "longer than announced");
        if (count - *taken < HEAD_BYTES + head.length)
            break;
        result = take_frame(self, events, at, &head);
        *taken += HEAD_BYTES + head.length;
    }
    return result;
}

/* Compares what is due of the client's preface; RFC 9113 section 3.4. */
static outcome take_preface(engine *self, const uint8_t *octets, size_t count,
                            size_t *taken)
{
    size_t due = count < self->preface ? count : self->preface;
    const char *magic =
        NGHTTP2_CLIENT_MAGIC + NGHTTP2_CLIENT_MAGIC_LEN - self->preface;
    if (memcmp(magic, octets, due) != 0)
        return fail(self, NGHTTP2_PROTOCOL_ERROR, "no preface");
    self->preface -= due;
    *taken += due;
    return GOOD;
}

/* Takes what came, and keeps what is not complete. */
static outcome take_octets(engine *self, PyObject *events,
                           const uint8_t *octets, size_t count)
{
    size_t taken = 0;
    bool is_rest = self->rest.used > 0;
    if (self->preface && count &&
        take_preface(self, octets, count, &taken) != GOOD)
        return FAULT;
    if (is_rest) {
        if (extend(&self->rest, octets, count) != GOOD)
            return BROKEN;
        octets = self->rest.octets;
        count = self->rest.used;
    }
    outcome result = take_frames(self, events, octets, count, &taken);
    if (result != GOOD)
        return result;
    if (is_rest && taken) {
        memmove(self->rest.octets, octets + taken, count - taken);
        self->rest.used = count - taken;
        if (!self->rest.used)
            release(&self->rest);
        return GOOD;
    }
    return is_rest ? GOOD
                   : extend(&self->rest, octets + taken, count - taken);
}

/* ---------------------------------------------------- methods, their parts */

/* Every method begins with it: -1 and an error when it may not go on. */
static int enter(engine *self)
{
    if (self->poisoned || self->busy) {
        PyErr_SetString(PyExc_RuntimeError,
                        self->busy ? "the engine is in use"
                                   : "the engine has failed before");
        return -1;
    }
    self->busy = true;
    return 0;
}

/* ... and ends with it: a new reference, or NULL with an error. */
static PyObject *leave(engine *self, outcome result, PyObject *value)
{
    self->busy = false;
    drop_fields(self);
    if (result != BROKEN)
        return value;
    self->poisoned = true;
    Py_XDECREF(value);
    return NULL;
}

/* GOAWAY; `last` never rises again (section 6.8). */
static outcome say_goodbye(engine *self, uint32_t code, int32_t last)
{
    uint8_t payload[8];
    if (last < self->last)
        self->last = last;
    put_u32(payload, (uint32_t)self->last);
    put_u32(payload + 4, code);
    return write_frame(self, NGHTTP2_GOAWAY, 0, payload, sizeof(payload));
}

/* Says what the fault is, to the peer and to our caller. */
static outcome end_with_fault(engine *self, PyObject *events)
{
    release(&self->rest);
    release(&self->block);
    self->preface = 0;
    self->closing = 1;
    if (say_goodbye(self, self->fault_code, self->highest) != GOOD)
        return BROKEN;
    PyObject *values[] = {
        PyLong_FromUnsignedLong(self->fault_code),
        PyUnicode_DecodeLatin1(self->fault_reason,
                               (Py_ssize_t)strlen(self->fault_reason), NULL)};
    return report(self, events, PROTOCOL_FAULT, 2, values);
}

/* Gives `count` octets of window back, less what nghttp2 gave already. */
static outcome give_window(engine *self, int32_t id, uint64_t count)
{
    stream *it = find(self, id);
    uint64_t before = count < self->prepaid ? count : self->prepaid;
    self->prepaid -= before;
    int result = nghttp2_session_consume_connection(self->session,
                                                    count - before);
    if (!result && it) {
        before = count < it->prepaid ? count : it->prepaid;
        it->prepaid -= (uint32_t)before;
        result = nghttp2_session_consume_stream(self->session, id,
                                                count - before);
    }
    return result ? give_up(result) : pump(self);
}

/* What `body` would take now. */
static int32_t room_of(engine *self, int32_t id)
{
    if (self->faulty || find(self, id) == NULL)
        return 0;
    int32_t room =
        nghttp2_session_get_stream_remote_window_size(self->session, id);
    int32_t other = nghttp2_session_get_remote_window_size(self->session);
    if (other < room)
        room = other;
    other = (int32_t)nghttp2_session_get_remote_settings(
        self->session, NGHTTP2_SETTINGS_MAX_FRAME_SIZE);
    if (other < room)
        room = other;
    return room < 0 ? 0 : room;
}

/* One field of an answer for nghttp2, which borrows its octets. */
static int fill_field(nghttp2_nv *field, PyObject *pair)
{
    if (!PyTuple_Check(pair) || PyTuple_GET_SIZE(pair) != 2 ||
        !PyBytes_Check(PyTuple_GET_ITEM(pair, 0)) ||
        !PyBytes_Check(PyTuple_GET_ITEM(pair, 1))) {
        PyErr_SetString(PyExc_TypeError, "a field is a pair of bytes");
        return -1;
    }
    PyObject *name = PyTuple_GET_ITEM(pair, 0);
    PyObject *value = PyTuple_GET_ITEM(pair, 1);
    *field = (nghttp2_nv){
        (uint8_t *)PyBytes_AS_STRING(name),
        (uint8_t *)PyBytes_AS_STRING(value),
        (size_t)PyBytes_GET_SIZE(name), (size_t)PyBytes_GET_SIZE(value),
        NGHTTP2_NV_FLAG_NO_COPY_NAME | NGHTTP2_NV_FLAG_NO_COPY_VALUE};
    return 0;
}

/* Whether fields are those of a 1xx response. */
static bool is_interim(const nghttp2_nv *field, size_t count)
{
    return count && field->namelen == 7 &&
           memcmp(field->name, ":status", 7) == 0 && field->valuelen &&
           field->value[0] == '1';
}

/* Why a head cannot be sent in the stream's state, NULL when it can. */
static const char *objection(engine *self, const stream *it, bool interim,
                             bool end)
{
    if (self->faulty || it == NULL || it->answered)
        return "the stream is closed";
    if (it->headed && !end)
        return "trailers end a stream";
    if (interim && (end || it->headed))
        return "an interim response is no end";
    return NULL;
}

/* Sends a head or trailers; GOOD too when `gone` tells why it is none. */
static outcome send_head(engine *self, int32_t id, const nghttp2_nv *fields,
                         size_t count, bool end, const char **gone)
{
    stream *it = find(self, id);
    bool interim = is_interim(fields, count);
    *gone = objection(self, it, interim, end);
    if (*gone)
        return GOOD;
    it->headed = it->headed || !interim;
    it->answered = end;
    int result = nghttp2_submit_headers(
        self->session, end ? NGHTTP2_FLAG_END_STREAM : NGHTTP2_FLAG_NONE, id,
        NULL, fields, count, NULL);
    return result ? give_up(result) : pump(self);
}

/* Sends the octets in `piece`; as send_head. */
static outcome send_piece(engine *self, int32_t id, bool end,
                          const char **gone)
{
    stream *it = find(self, id);
    int32_t room = room_of(self, id);
    if (self->faulty || it == NULL || !it->headed || it->answered)
        *gone = "the stream is closed";
    else if (self->piece_length > (size_t)room)
        *gone = "the piece is longer than the window";
    if (*gone || (!self->piece_length && !end))
        return GOOD;
    if (room == 0)
        /* nghttp2 would hold even an empty DATA frame back, which needs no
         * window (RFC 9113 6.9.1).  Trailers without fields say the same. */
        return send_head(self, id, NULL, 0, true, gone);
    it->answered = end;
    nghttp2_data_provider provider = {{0}, offer_piece};
    int result = nghttp2_submit_data(
        self->session, end ? NGHTTP2_FLAG_END_STREAM : NGHTTP2_FLAG_NONE, id,
        &provider);
    outcome sent = result ? give_up(result) : pump(self);
    if (sent == GOOD && self->piece_length)
        return give_up(NGHTTP2_ERR_INVALID_STATE);
    return sent;
}

/* None, or NULL with StreamGone. */
static PyObject *none_or_gone(engine *self, const char *gone)
{
    if (gone == NULL)
        Py_RETURN_NONE;
    PyErr_SetString(self->words->gone, gone);
    return NULL;
}

/* A stream's number, -1 with an error. */
static int32_t read_stream(PyObject *number)
{
    long id = PyLong_AsLong(number);
    if (id >= 0 && id <= HIGHEST_STREAM)
        return (int32_t)id;
    if (!PyErr_Occurred())
        PyErr_SetString(PyExc_ValueError, "a stream is from 0 to 2**31 - 1");
    return -1;
}

/* An error code, `*code` of it; -1 with an error. */
static int read_code(PyObject *number, uint32_t *code)
{
    unsigned long value = PyLong_AsUnsignedLong(number);
    if (value == (unsigned long)-1 && PyErr_Occurred())
        return -1;
    *code = (uint32_t)value;
    return 0;
}

/* The arguments (stream, something, end=False); -1 with an error. */
static int read_sending(PyObject *const *args, Py_ssize_t count,
                        PyObject *keywords, int32_t *id)
{
    Py_ssize_t named = keywords ? PyTuple_GET_SIZE(keywords) : 0;
    int end = 0;
    if (count < 2 || count + named > 3 ||
        (named && PyUnicode_CompareWithASCIIString(
                      PyTuple_GET_ITEM(keywords, 0), "end") != 0)) {
        PyErr_SetString(PyExc_TypeError,
                        "expected (stream, fields or piece, end=False)");
        return -1;
    }
    *id = read_stream(args[0]);
    if (*id >= 0 && count + named == 3)
        end = PyObject_IsTrue(args[2]);
    return *id < 0 ? -1 : end;
}

/* --------------------------------------------------------------- methods */

PyDoc_STRVAR(receive_doc, "Events that octets from the peer give.");

static PyObject *engine_receive(engine *self, PyObject *data)
{
    Py_buffer view;
    if (enter(self) < 0)
        return NULL;
    if (PyObject_GetBuffer(data, &view, PyBUF_SIMPLE) < 0) {
        self->busy = false;
        return NULL;
    }
    PyObject *events = PyList_New(0);
    outcome result = events ? GOOD : BROKEN;
    if (result == GOOD && !self->faulty) {
        if (self->table)
            hot_begin(self->table);
        result = take_octets(self, events, view.buf, (size_t)view.len);
        if (result == FAULT)
            result = end_with_fault(self, events);
    }
    PyBuffer_Release(&view);
    return leave(self, result, events);
}

PyDoc_STRVAR(hungry_doc, "Whether more input can be used: always.");

static PyObject *engine_hungry(engine *self, PyObject *nothing)
{
    /* What a peer may have under way is bounded by its windows. */
    (void)self, (void)nothing;
    Py_RETURN_TRUE;
}

PyDoc_STRVAR(midway_doc, "Whether a head or frame began and is not complete.");

static PyObject *engine_midway(engine *self, PyObject *nothing)
{
    (void)nothing;
    return PyBool_FromLong(self->rest.used || self->block.used ||
                           self->preface);
}

PyDoc_STRVAR(time_out_doc, "Events that end what takes too long to come.");

static PyObject *engine_time_out(engine *self, PyObject *nothing)
{
    (void)nothing;
    if (enter(self) < 0)
        return NULL;
    PyObject *events = PyList_New(0);
    outcome result = events ? GOOD : BROKEN;
    if (result == GOOD) {
        fail(self, NGHTTP2_ENHANCE_YOUR_CALM, "a frame came too slowly");
        result = end_with_fault(self, events);
    }
    return leave(self, result, events);
}

PyDoc_STRVAR(sendable_doc, "Octets that `body` would take now.");

static PyObject *engine_sendable(engine *self, PyObject *number)
{
    int32_t id = read_stream(number);
    if (id < 0 || enter(self) < 0)
        return NULL;
    return leave(self, GOOD, PyLong_FromLong(room_of(self, id)));
}

PyDoc_STRVAR(is_held_doc,
             "Whether the stream's own window lets nothing pass.");

static PyObject *engine_is_held(engine *self, PyObject *number)
{
    int32_t id = read_stream(number);
    if (id < 0 || enter(self) < 0)
        return NULL;
    /* A window below zero counts as 0. */
    bool is_held = find(self, id) != NULL &&
                   nghttp2_session_get_stream_remote_window_size(
                       self->session, id) == 0;
    return leave(self, GOOD, PyBool_FromLong(is_held));
}

PyDoc_STRVAR(headers_doc,
             "Sends a response head, or trailers with `end`; may raise "
             "StreamGone.");

static PyObject *engine_headers(engine *self, PyObject *const *args,
                                Py_ssize_t count, PyObject *keywords)
{
    nghttp2_nv few[FEW_FIELDS], *fields = few;
    int32_t id;
    int end = read_sending(args, count, keywords, &id);
    PyObject *given =
        end < 0 ? NULL : PySequence_Fast(args[1], "expected a list of fields");
    if (given == NULL || enter(self) < 0) {
        Py_XDECREF(given);
        return NULL;
    }
    const char *gone = NULL;
    PyObject *answer = NULL;
    outcome result = GOOD;
    Py_ssize_t length = PySequence_Fast_GET_SIZE(given), n = 0;
    if (length > FEW_FIELDS)
        fields = PyMem_New(nghttp2_nv, length);
    if (fields == NULL)
        PyErr_NoMemory();
    while (fields && n < length &&
           fill_field(fields + n, PySequence_Fast_GET_ITEM(given, n)) == 0)
        n++;
    if (fields && n == length) {
        result = send_head(self, id, fields, (size_t)length, end, &gone);
        answer = result == GOOD ? none_or_gone(self, gone) : NULL;
    }
    if (fields != few)
        PyMem_Free(fields);
    Py_DECREF(given);
    return leave(self, result, answer);
}

PyDoc_STRVAR(body_doc,
             "Sends a piece no longer than `sendable`; may raise StreamGone.");

static PyObject *engine_body(engine *self, PyObject *const *args,
                             Py_ssize_t count, PyObject *keywords)
{
    Py_buffer view;
    int32_t id;
    const char *gone = NULL;
    int end = read_sending(args, count, keywords, &id);
    if (end < 0 || PyObject_GetBuffer(args[1], &view, PyBUF_SIMPLE) < 0)
        return NULL;
    if (enter(self) < 0) {
        PyBuffer_Release(&view);
        return NULL;
    }
    /* A peer in good faith gives each DATA frame back in two WINDOW_UPDATE
     * frames; one that asks for crumbs is none. */
    if (view.len >= CRUMB_BYTES)
        self->nuisance -= 2;
    self->piece = view.buf;
    self->piece_length = (size_t)view.len;
    outcome result = send_piece(self, id, end, &gone);
    self->piece = NULL;
    self->piece_length = 0;
    PyBuffer_Release(&view);
    return leave(self, result,
                 result == GOOD ? none_or_gone(self, gone) : NULL);
}

PyDoc_STRVAR(reset_doc, "Gives the stream up; does nothing when it is gone.");

static PyObject *engine_reset(engine *self, PyObject *const *args,
                              Py_ssize_t count)
{
    uint32_t code;
    if (count != 2) {
        PyErr_SetString(PyExc_TypeError, "expected (stream, code)");
        return NULL;
    }
    int32_t id = read_stream(args[0]);
    if (id < 0 || read_code(args[1], &code) < 0 || enter(self) < 0)
        return NULL;
    outcome result = self->faulty ? GOOD : reset_stream(self, id, code);
    return leave(self, result, result == GOOD ? Py_NewRef(Py_None) : NULL);
}

PyDoc_STRVAR(goodbye_doc,
             "Takes no streams above `last` any more; open ones go on.");

static PyObject *engine_goodbye(engine *self, PyObject *args,
                                PyObject *keywords)
{
    static char *names[] = {"code", "last", NULL};
    PyObject *number = NULL, *last = Py_None;
    uint32_t code = 0;
    int32_t id = self->highest;
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "|OO", names, &number,
                                     &last))
        return NULL;
    if (number && read_code(number, &code) < 0)
        return NULL;
    if (last != Py_None && (id = read_stream(last)) < 0)
        return NULL;
    if (enter(self) < 0)
        return NULL;
    outcome result = say_goodbye(self, code, id);
    return leave(self, result, result == GOOD ? Py_NewRef(Py_None) : NULL);
}

PyDoc_STRVAR(consumed_doc, "Lets the peer send `count` octets of body more.");

static PyObject *engine_consumed(engine *self, PyObject *const *args,
                                 Py_ssize_t count)
{
    if (count != 2) {
        PyErr_SetString(PyExc_TypeError, "expected (stream, count)");
        return NULL;
    }
    int32_t id = read_stream(args[0]);
    uint32_t octets;
    if (id < 0 || read_code(args[1], &octets) < 0 || enter(self) < 0)
        return NULL;
    outcome result = self->faulty ? GOOD : give_window(self, id, octets);
    return leave(self, result, result == GOOD ? Py_NewRef(Py_None) : NULL);
}

PyDoc_STRVAR(output_doc, "All that is to be written since the last call.");

static PyObject *engine_output(engine *self, PyObject *nothing)
{
    (void)nothing;
    if (enter(self) < 0)
        return NULL;
    PyObject *written = self->out;
    self->out = NULL;
    if (written == NULL)
        written = PyBytes_FromStringAndSize(NULL, 0);
    else if ((size_t)PyBytes_GET_SIZE(written) != self->out_used)
        _PyBytes_Resize(&written, (Py_ssize_t)self->out_used);
    self->out_used = 0;
    return leave(self, written ? GOOD : BROKEN, written);
}

/* Whether nothing is to be done until the peer says more. */
static bool is_at_rest(const engine *self)
{
    return !self->open && !self->out && !self->rest.used &&
           !self->block.used && !self->preface && !self->closing &&
           self->nuisance <= self->judged &&
           self->judged - self->nuisance < UNJUDGED_POINTS;
}

/* Takes what came and sends what there is, unless there are events.
 *
 * In a `round` of the loop, a number, who looked at a source looked at it for
 * all: the record for which the loop calls us had begun to come before, and so
 * its requests had been made.  Records behind it may be newer than the look.
 */
static outcome take_turn(engine *self, const wire_input *input, size_t most,
                         long round, PyObject *events, PyObject **unsent)
{
    size_t served;
    outcome result = GOOD;
    if (self->table && round >= 0 && input->records == 1)
        hot_begin_in_round(self->table, round);
    else if (self->table)
        hot_begin(self->table);
    if (input->count)
        result = take_octets(self, events, input->octets, input->count);
    if (result == FAULT)
        result = end_with_fault(self, events);
    if (result != GOOD || PyList_GET_SIZE(events))
        return result;
    if (serve(self, most, &served) != GOOD)
        return BROKEN;
    *unsent = wire_put(
        &self->wire,
        self->out ? (uint8_t *)PyBytes_AS_STRING(self->out) : NULL,
        self->out_used);
    Py_CLEAR(self->out);
    self->out_used = 0;
    return GOOD;
}

/* The exception that is set, as a value. */
static PyObject *take_exception(void)
{
    PyObject *type, *value, *traceback;
    PyErr_Fetch(&type, &value, &traceback);
    PyErr_NormalizeException(&type, &value, &traceback);
    if (traceback)
        PyException_SetTraceback(value, traceback);
    Py_XDECREF(type);
    Py_XDECREF(traceback);
    return value;
}

/* A turn: what `turn` returns, NULL with an error that is no OSError. */
static PyObject *move_octets(engine *self, PyObject *pending, size_t most,
                             long round)
{
    wire_input input;
    input.count = 0;
    input.records = 0;
    input.ended = false;
    PyObject *answer = NULL;
    PyObject *events = PyList_New(0);
    PyObject *unsent = events && pending ? wire_push(&self->wire, pending)
                                         : NULL;
    wire_news news = PyErr_Occurred() ? WIRE_BROKEN : WIRE_SILENT;
    outcome result = GOOD;
    if (news == WIRE_SILENT && (!unsent || !PyBytes_GET_SIZE(unsent))) {
        Py_CLEAR(unsent);
        news = wire_take(&self->wire, &input);
        if (news == WIRE_GAVE || news == WIRE_SILENT)
            result = take_turn(self, &input, most, round, events, &unsent);
    }
    if (news == WIRE_CLOSED)
        answer = Py_NewRef(Py_False);
    else if (unsent && !PyBytes_GET_SIZE(unsent) && !input.ended &&
             is_at_rest(self))
        answer = Py_NewRef(Py_True);
    else if (result == GOOD && !PyErr_Occurred())
        answer = Py_BuildValue("OOO", events, unsent ? unsent : Py_None,
                               input.ended ? Py_True : Py_False);
    else if (result == GOOD && PyErr_ExceptionMatches(PyExc_OSError))
        answer = take_exception();
    Py_XDECREF(events);
    Py_XDECREF(unsent);
    return answer;
}

PyDoc_STRVAR(attach_doc,
             "attach(tls, socket): has it move the octets of this "
             "ssl.SSLObject, whose\nhandshake is over, and of the descriptor "
             "below, by `turn` and `wake`.\n\n"
             "False: that is an object of a kind that it does not know.");

static PyObject *engine_attach(engine *self, PyObject *const *args,
                               Py_ssize_t count)
{
    if (count != 2) {
        PyErr_SetString(PyExc_TypeError, "expected (tls, socket)");
        return NULL;
    }
    int socket = _PyLong_AsInt(args[1]);
    if (PyErr_Occurred() || enter(self) < 0)
        return NULL;
    bool attached =
        wire_attach(&self->wire, &self->words->tls, args[0], socket);
    return leave(self, GOOD,
                 PyErr_Occurred() ? NULL : PyBool_FromLong(attached));
}

/* Every turn begins with it: -1 and an error when there can be none. */
static int enter_turn(engine *self)
{
    if (self->wire.tls == NULL) {
        PyErr_SetString(PyExc_RuntimeError, "attach comes first");
        return -1;
    }
    return enter(self);
}

PyDoc_STRVAR(turn_doc,
             "turn(pending, most): a turn of a connection where nobody else "
             "has anything\nin hand: `pending` is sent, what came is taken, "
             "and about `most` octets of\nbodies go.\n\n"
             "True: it is at rest.  False: its socket has an end.  An "
             "OSError: what is\nwrong with socket or TLS.  Else a tuple of "
             "events, what the socket did\nnot take, and whether TLS has "
             "ended.");

static PyObject *engine_turn(engine *self, PyObject *const *args,
                             Py_ssize_t count)
{
    if (count != 2) {
        PyErr_SetString(PyExc_TypeError, "expected (pending, most)");
        return NULL;
    }
    size_t most = PyLong_AsSize_t(args[1]);
    int is_pending = PyObject_IsTrue(args[0]);
    if (PyErr_Occurred() || enter_turn(self) < 0)
        return NULL;
    PyObject *answer =
        move_octets(self, is_pending ? args[0] : NULL, most, -1);
    return leave(self, answer ? GOOD : BROKEN, answer);
}

/* Which round of a loop this is; negative when it does not count them. */
static long round_of(engine *self, PyObject *loop)
{
    PyObject *number = PyObject_GetAttr(loop, self->words->iteration);
    long round = number ? PyLong_AsLong(number) : -1;
    Py_XDECREF(number);
    if (PyErr_Occurred() && PyErr_ExceptionMatches(PyExc_AttributeError))
        PyErr_Clear();
    return round;
}

PyDoc_STRVAR(wake_doc,
             "wake(events, otherwise, go_on, most, loop): for the loop to call "
             "when the\nsocket is ready.\n\n"
             "While `rests`, it takes a turn.  If all is at rest again, "
             "`stirred` becomes\ntrue and that was all; else it is "
             "go_on(what the turn returned).  While not,\nit is "
             "otherwise(events).");

static PyObject *engine_wake(engine *self, PyObject *const *args,
                             Py_ssize_t count)
{
    if (count != 5) {
        PyErr_SetString(PyExc_TypeError,
                        "expected (events, otherwise, go_on, most, loop)");
        return NULL;
    }
    if (!self->rests)
        return PyObject_CallOneArg(args[1], args[0]);
    size_t most = PyLong_AsSize_t(args[3]);
    long round = PyErr_Occurred() ? -1 : round_of(self, args[4]);
    if (PyErr_Occurred() || enter_turn(self) < 0)
        return NULL;
    PyObject *answer = move_octets(self, NULL, most, round);
    answer = leave(self, answer ? GOOD : BROKEN, answer);
    if (answer == Py_True) {
        self->stirred = true;
        Py_DECREF(answer);
        Py_RETURN_NONE;
    }
    self->rests = false;
    if (answer == NULL)
        answer = take_exception();
    PyObject *done = PyObject_CallOneArg(args[2], answer);
    Py_DECREF(answer);
    return done;
}

PyDoc_STRVAR(serve_doc,
             "Sends about `most` octets of bodies out of the table; how many.");

static PyObject *engine_serve(engine *self, PyObject *number)
{
    size_t most = PyLong_AsSize_t(number), served = 0;
    if (PyErr_Occurred() || enter(self) < 0)
        return NULL;
    outcome result = serve(self, most, &served);
    return leave(self, result,
                 result == GOOD ? PyLong_FromSize_t(served) : NULL);
}

PyDoc_STRVAR(backlog_doc,
             "Level of the most urgent of these that can be sent, or 8.");

static PyObject *engine_backlog(engine *self, PyObject *nothing)
{
    int level = NO_LEVEL;
    (void)nothing;
    if (enter(self) < 0)
        return NULL;
    for (stream *it = self->waiting ? self->open : NULL; it; it = it->after)
        if (it->capsule && it->urgency.level < level && room_of(self, it->id))
            level = it->urgency.level;
    return leave(self, GOOD, PyLong_FromLong(level));
}

PyDoc_STRVAR(reprioritize_doc,
             "reprioritize(stream, level, incremental), if it is one of "
             "these.");

static PyObject *engine_reprioritize(engine *self, PyObject *args)
{
    int id, incremental;
    unsigned char level;
    if (!PyArg_ParseTuple(args, "ibp", &id, &level, &incremental) ||
        enter(self) < 0)
        return NULL;
    stream *it = find(self, id);
    if (it)
        it->urgency = (hot_urgency){level, incremental};
    return leave(self, GOOD, Py_NewRef(Py_None));
}

/* Lets go of all answers that wait. */
static void abandon(engine *self)
{
    for (stream *it = self->waiting ? self->open : NULL; it; it = it->after)
        if (it->capsule)
            let_go(self, it);
}

PyDoc_STRVAR(abandon_doc, "Sends no more of these, and logs them as cut.");

static PyObject *engine_abandon(engine *self, PyObject *nothing)
{
    (void)nothing;
    if (enter(self) < 0)
        return NULL;
    abandon(self);
    return leave(self, GOOD, Py_NewRef(Py_None));
}

PyDoc_STRVAR(answer_from_doc,
             "Has it answer from a HotTable what it can, to a client that "
             "the log calls so; None is no table.");

static PyObject *engine_answer_from(engine *self, PyObject *const *args,
                                    Py_ssize_t count)
{
    bool is_table = count == 2 && Py_IS_TYPE(args[0], (PyTypeObject *)
                                             self->words->table);
    if (count != 2 || !PyUnicode_Check(args[1]) ||
        !(is_table || Py_IsNone(args[0]))) {
        PyErr_SetString(PyExc_TypeError, "expected (table, client)");
        return NULL;
    }
    PyObject *client =
        PyUnicode_AsEncodedString(args[1], "utf-8", "backslashreplace");
    if (client == NULL || enter(self) < 0) {
        Py_XDECREF(client);
        return NULL;
    }
    abandon(self);
    Py_XSETREF(self->client, client);
    Py_XSETREF(self->table,
               is_table ? (hot_table *)Py_NewRef(args[0]) : NULL);
    return leave(self, GOOD, Py_NewRef(Py_None));
}

/* ------------------------------------------------------ life of an engine */

/* nghttp2 takes its memory where Python does: tracemalloc sees it.
 *
 * But for the buffer that a session begins with to write a frame into: `pump`
 * leaves it empty, and no two sessions are on the stack at a time, so that
 * one does for all.  It is most of what an idle session would hold.
 */
static void *take_memory(size_t size, void *nothing)
{
    (void)nothing;
    return PyMem_Malloc(size);
}

static void free_memory(void *it, void *user)
{
    engine *self = user;
    if (it != self->words->frame)
        PyMem_Free(it);
}

static void *take_cleared_memory(size_t count, size_t size, void *nothing)
{
    (void)nothing;
    return PyMem_Calloc(count, size);
}

static void *resize_memory(void *it, size_t size, void *user)
{
    engine *self = user;
    uint8_t *frame = self->words->frame;
    if (it == NULL && size == FRAME_BUFFER_BYTES && !self->session &&
        !self->borrows) {
        self->borrows = true;
        return frame;
    }
    if (it != frame)
        return PyMem_Realloc(it, size);
    void *own = PyMem_Malloc(size);
    if (own)
        memcpy(own, frame,
               size < FRAME_BUFFER_BYTES ? size : FRAME_BUFFER_BYTES);
    return own;
}

/* Rules that are ours are lifted from nghttp2. */
static void set_options(nghttp2_option *option)
{
    const uint64_t never = UINT32_MAX;
    nghttp2_option_set_no_auto_window_update(option, 1);
    nghttp2_option_set_no_http_messaging(option, 1);
    nghttp2_option_set_no_closed_streams(option, 1);
    nghttp2_option_set_max_settings(option, MOST_SETTINGS);
    nghttp2_option_set_max_outbound_ack(option, INT32_MAX);
    nghttp2_option_set_max_send_header_block_length(option, INT32_MAX);
    if (nghttp2_option_set_stream_reset_rate_limit)
        nghttp2_option_set_stream_reset_rate_limit(option, never, never);
    if (nghttp2_option_set_max_continuations)
        nghttp2_option_set_max_continuations(option, MOST_CONTINUATIONS);
    if (nghttp2_option_set_glitch_rate_limit)
        nghttp2_option_set_glitch_rate_limit(option, never, never);
}

static void set_callbacks(nghttp2_session_callbacks *to)
{
    nghttp2_session_callbacks_set_on_header_callback(to, on_header);
    nghttp2_session_callbacks_set_on_frame_recv_callback(to, on_frame);
    nghttp2_session_callbacks_set_before_frame_send_callback(to, before_frame);
    nghttp2_session_callbacks_set_on_stream_close_callback(to, on_close);
    nghttp2_session_callbacks_set_send_data_callback(to, write_piece);
}

/* Makes the session; 0, or nghttp2's error. */
static int open_session(engine *self)
{
    nghttp2_mem memory = {self, take_memory, free_memory, take_cleared_memory,
                          resize_memory};
    nghttp2_session *session;
    nghttp2_option *option = NULL;
    nghttp2_session_callbacks *callbacks = NULL;
    int result = nghttp2_option_new(&option);
    if (!result)
        result = nghttp2_session_callbacks_new(&callbacks);
    if (!result) {
        set_options(option);
        set_callbacks(callbacks);
        result = nghttp2_session_server_new3(&session, callbacks, self, option,
                                             &memory);
        if (!result)
            self->session = session;
    }
    nghttp2_session_callbacks_del(callbacks);
    nghttp2_option_del(option);
    return result;
}

/* Writes our settings, all of which are stated; RFC 9113 section 6.5.2. */
static outcome write_settings(engine *self, uint32_t window)
{
    const uint32_t pairs[][2] = {
        {NGHTTP2_SETTINGS_HEADER_TABLE_SIZE, 4096},
        {NGHTTP2_SETTINGS_ENABLE_PUSH, 0},
        {NGHTTP2_SETTINGS_MAX_CONCURRENT_STREAMS, (uint32_t)self->streams},
        {NGHTTP2_SETTINGS_INITIAL_WINDOW_SIZE, window},
        {NGHTTP2_SETTINGS_MAX_FRAME_SIZE, FRAME_BYTES},
        {NGHTTP2_SETTINGS_MAX_HEADER_LIST_SIZE, (uint32_t)self->header_bytes},
        {NGHTTP2_SETTINGS_ENABLE_CONNECT_PROTOCOL, 1},
        {NO_RFC7540_PRIORITIES, 1}};
    const size_t count = sizeof(pairs) / sizeof(*pairs);
    uint8_t payload[6 * sizeof(pairs) / sizeof(*pairs)];
    for (size_t n = 0; n < count; n++) {
        payload[6 * n] = 0;
        payload[6 * n + 1] = (uint8_t)pairs[n][0];
        put_u32(payload + 6 * n + 2, pairs[n][1]);
    }
    return write_frame(self, NGHTTP2_SETTINGS, 0, payload, sizeof(payload));
}

/* Says what we allow, and has nghttp2 count on it.
 *
 * It gets neither the number of streams, which it would make a connection
 * error of, nor is its own SETTINGS frame sent.
 */
static outcome announce(engine *self, uint32_t window)
{
    int64_t connection = WINDOWS * (int64_t)window;
    const nghttp2_settings_entry entries[] = {
        {NGHTTP2_SETTINGS_INITIAL_WINDOW_SIZE, window},
        {NO_RFC7540_PRIORITIES, 1}};
    const uint8_t *dropped;
    int result = nghttp2_submit_settings(
        self->session, NGHTTP2_FLAG_NONE, entries,
        sizeof(entries) / sizeof(*entries));
    ssize_t count = 1;
    while (!result && count > 0)
        count = nghttp2_session_mem_send(self->session, &dropped);
    if (result || count < 0)
        return give_up(result ? result : (int)count);
    if (write_settings(self, window) != GOOD)
        return BROKEN;
    if (connection < FIRST_WINDOW)
        return GOOD;
    result = nghttp2_session_set_local_window_size(
        self->session, NGHTTP2_FLAG_NONE, 0, (int32_t)connection);
    return result ? give_up(result) : pump(self);
}

/* A number from EngineLimits, -1 with an error. */
static int64_t read_limit(PyObject *limits, const char *name)
{
    PyObject *number = attribute_of(limits, name);
    long long value = number ? PyLong_AsLongLong(number) : -1;
    Py_XDECREF(number);
    if (value >= 0 && value <= UINT32_MAX)
        return value;
    if (!PyErr_Occurred())
        PyErr_Format(PyExc_ValueError, "%s is out of range", name);
    return -1;
}

/* Reads the limits and opens the session. */
static outcome begin(engine *self, PyObject *limits)
{
    int64_t window = 0;
    if ((self->header_bytes = read_limit(limits, "header_bytes")) < 0 ||
        (self->header_count = read_limit(limits, "header_count")) < 0 ||
        (self->streams = read_limit(limits, "streams")) < 0 ||
        (window = read_limit(limits, "window_bytes")) < 0)
        return BROKEN;
    if (window > INT32_MAX / WINDOWS) {
        PyErr_SetString(PyExc_ValueError, "a window is out of range");
        return BROKEN;
    }
    int result = open_session(self);
    if (result)
        return give_up(result);
    return announce(self, (uint32_t)window);
}

/* Http2Engine(limits): `limits` is an EngineLimits of room 5. */
static PyObject *engine_new(PyTypeObject *type, PyObject *args,
                            PyObject *keywords)
{
    static char *names[] = {"limits", NULL};
    PyObject *limits;
    words *bound = PyType_GetModuleState(type);
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "O", names, &limits))
        return NULL;
    if (bound == NULL || bound->gone == NULL) {
        PyErr_SetString(PyExc_RuntimeError, "bind comes first");
        return NULL;
    }
    engine *self = (engine *)type->tp_alloc(type, 0);
    if (self == NULL)
        return NULL;
    self->words = bound;
    self->preface = NGHTTP2_CLIENT_MAGIC_LEN;
    self->last = HIGHEST_STREAM;
    if (begin(self, limits) != GOOD)
        Py_CLEAR(self);
    return (PyObject *)self;
}

/* Nothing here refers to what may refer to us, so there is no GC support. */
static void engine_dealloc(engine *self)
{
    PyTypeObject *type = Py_TYPE(self);
    /* Its end calls nothing back, so the streams are still in our list. */
    nghttp2_session_del(self->session);
    while (self->open)
        part_from(self, self->open);
    drop_fields(self);
    PyMem_Free(self->fields);
    PyMem_Free(self->closed);
    PyMem_Free(self->early);
    release(&self->rest);
    release(&self->block);
    Py_CLEAR(self->out);
    Py_CLEAR(self->table);
    Py_CLEAR(self->client);
    wire_detach(&self->wire);
    type->tp_free(self);
    Py_DECREF(type);
}

/* ----------------------------------------------------- type and module */

#define METHOD(name, flags) \
    {#name, (PyCFunction)(void (*)(void))engine_##name, flags, name##_doc}

static PyMethodDef engine_methods[] = {
    METHOD(receive, METH_O),
    METHOD(hungry, METH_NOARGS),
    METHOD(midway, METH_NOARGS),
    METHOD(time_out, METH_NOARGS),
    METHOD(sendable, METH_O),
    METHOD(is_held, METH_O),
    METHOD(headers, METH_FASTCALL | METH_KEYWORDS),
    METHOD(body, METH_FASTCALL | METH_KEYWORDS),
    METHOD(reset, METH_FASTCALL),
    METHOD(goodbye, METH_VARARGS | METH_KEYWORDS),
    METHOD(consumed, METH_FASTCALL),
    METHOD(output, METH_NOARGS),
    METHOD(attach, METH_FASTCALL),
    METHOD(turn, METH_FASTCALL),
    METHOD(wake, METH_FASTCALL),
    METHOD(serve, METH_O),
    METHOD(backlog, METH_NOARGS),
    METHOD(reprioritize, METH_VARARGS),
    METHOD(abandon, METH_NOARGS),
    METHOD(answer_from, METH_FASTCALL),
    {NULL, NULL, 0, NULL}};

static PyMemberDef engine_members[] = {
    {"nuisance", T_LONGLONG, offsetof(engine, nuisance), 0,
     "sum of the points of what the peer sent"},
    {"judged", T_LONGLONG, offsetof(engine, judged), 0,
     "what `nuisance` was when somebody looked at it last"},
    {"closing", T_BOOL, offsetof(engine, closing), 0,
     "whether to close once `output` is written"},
    {"served", T_LONGLONG, offsetof(engine, served), READONLY,
     "octets of bodies that were sent out of the table"},
    {"waiting", T_INT, offsetof(engine, waiting), READONLY,
     "number of streams that get their answer from the table"},
    {"rests", T_BOOL, offsetof(engine, rests), 0,
     "whether nothing is due until the peer says more"},
    {"stirred", T_BOOL, offsetof(engine, stirred), 0,
     "whether it said something since, and all is at rest again"},
    {"recalled", T_INT, offsetof(engine, recalled), READONLY,
     "newest stream that gets its answer from the table"},
    {NULL, 0, 0, 0, NULL}};

PyDoc_STRVAR(engine_doc, "RFC 9113 through nghttp2; see Engine in room 5.");

static PyType_Slot engine_slots[] = {
    {Py_tp_doc, (void *)engine_doc},
    {Py_tp_new, engine_new},
    {Py_tp_dealloc, engine_dealloc},
    {Py_tp_methods, engine_methods},
    {Py_tp_members, engine_members},
    {0, NULL}};

static PyType_Spec engine_spec = {
    .name = "shimmercat_ext.native.Http2Engine",
    .basicsize = sizeof(engine),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = engine_slots};

PyDoc_STRVAR(bind_doc,
             "bind(abi, events, gone): the engine in the words of room 5.\n\n"
             "`events` are its named tuples in their order, `gone` is its "
             "StreamGone.\n"
             "None when it was built for another ABI.");

static PyObject *module_bind(PyObject *module, PyObject *args)
{
    static const Py_ssize_t sizes[EVENTS] = {3, 2, 3, 2, 2, 2, 1, 2};
    words *state = PyModule_GetState(module);
    PyObject *events, *gone;
    int abi;
    if (!PyArg_ParseTuple(args, "iO!O", &abi, &PyTuple_Type, &events, &gone))
        return NULL;
    if (abi != ABI)
        Py_RETURN_NONE;
    bool is_right = PyTuple_GET_SIZE(events) == EVENTS &&
                    PyExceptionClass_Check(gone);
    for (int n = 0; is_right && n < EVENTS; n++) {
        PyObject *event = PyTuple_GET_ITEM(events, n);
        PyObject *fields = PyObject_GetAttrString(event, "_fields");
        is_right = fields && PyType_Check(event) && PyTuple_Check(fields) &&
                   PyType_IsSubtype((PyTypeObject *)event, &PyTuple_Type) &&
                   PyTuple_GET_SIZE(fields) == sizes[n];
        Py_XDECREF(fields);
    }
    if (!is_right) {
        PyErr_SetString(PyExc_TypeError, "not the words of this ABI");
        return NULL;
    }
    for (int n = 0; n < EVENTS; n++)
        Py_XSETREF(state->events[n], Py_NewRef(PyTuple_GET_ITEM(events, n)));
    Py_XSETREF(state->gone, Py_NewRef(gone));
    if (!wire_find_library(&state->tls))
        state->tls = (tls_library){NULL};
    if (PyErr_Occurred())
        return NULL;
    return Py_NewRef(state->type);
}

/* Sets a class attribute; steals the value, which may be NULL. */
static int describe(PyObject *type, const char *name, PyObject *value)
{
    int result = value ? PyObject_SetAttrString(type, name, value) : -1;
    Py_XDECREF(value);
    return result;
}

static int module_exec(PyObject *module)
{
    words *state = PyModule_GetState(module);
    state->type = PyType_FromModuleAndSpec(module, &engine_spec, NULL);
    state->table = PyType_FromModuleAndSpec(module, &hot_table_spec, NULL);
    state->iteration = PyUnicode_InternFromString("iteration");
    if (!state->type || !state->table || !state->iteration)
        return -1;
    PyObject *protocol = PyUnicode_FromString("h2");
    PyObject *library =
        PyUnicode_FromFormat("nghttp2 %s", nghttp2_version(0)->version_str);
    int failed = describe(state->type, "protocol", protocol);
    failed |= describe(state->type, "library", library);
    failed |= describe(state->type, "hot_table", Py_NewRef(state->table));
    if (failed || PyModule_AddIntConstant(module, "ABI", ABI) < 0)
        return -1;
    return 0;
}

static int module_traverse(PyObject *module, visitproc visit, void *arg)
{
    words *state = PyModule_GetState(module);
    Py_VISIT(state->type);
    Py_VISIT(state->table);
    Py_VISIT(state->gone);
    Py_VISIT(state->iteration);
    for (int n = 0; n < EVENTS; n++)
        Py_VISIT(state->events[n]);
    return 0;
}

static int module_clear(PyObject *module)
{
    words *state = PyModule_GetState(module);
    Py_CLEAR(state->type);
    Py_CLEAR(state->table);
    Py_CLEAR(state->gone);
    Py_CLEAR(state->iteration);
    for (int n = 0; n < EVENTS; n++)
        Py_CLEAR(state->events[n]);
    return 0;
}

static PyMethodDef module_methods[] = {
    {"bind", module_bind, METH_VARARGS, bind_doc}, {NULL, NULL, 0, NULL}};

static PyModuleDef_Slot module_slots[] = {
    {Py_mod_exec, module_exec}, {0, NULL}};

static PyModuleDef module_definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "shimmercat_ext.native.engine",
    .m_doc = "HTTP/2 of one connection, by nghttp2.",
    .m_size = sizeof(words),
    .m_methods = module_methods,
    .m_slots = module_slots,
    .m_traverse = module_traverse,
    .m_clear = module_clear};

PyMODINIT_FUNC PyInit_engine(void)
{
    return PyModuleDef_Init(&module_definition);
}
