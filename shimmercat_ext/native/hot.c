/* The hot table: answers of a worker that the engine gives by itself.
 *
 * Python puts an answer here after it has given it; from then on a request
 * that is the same in all that matters gets it from the engine, and Python
 * hears nothing of that but a record for the log.  What Python would answer
 * must not differ, so
 *
 * - the key is made of all that an answer may depend on, octet for octet:
 *   authority, target, Accept and Accept-Encoding of a GET over https;
 * - a request with any field that is not in `IDLE`, those which nothing looks
 *   at that answers from files, has no key; its urgency changes no more than
 *   the order of answers;
 * - the source is looked at behind each request (hot_confirm), just as
 *   Asset.is_current does in room 10b: once for all that came together.  What
 *   made the loop call us was there before anything was done in its round, so
 *   a look in the same round is behind it too (engine.c, wake);
 * - whoever changes what a file is answered with calls `drop`.
 *
 * `put` takes its key from a request that was answered, by the same function
 * as hot_find.  A field that comes to matter must leave IDLE.
 *
 * Contract.  The GIL is held throughout, and nothing here calls Python code.
 * The table holds bytes and tuples of bytes only, so it is in no cycle.
 */

#include "hot.h"

#include <structmember.h>

#include <string.h>
#include <sys/stat.h>
#include <time.h>

/* Limits. */
#define MOST_ANSWERS 2048
#define MOST_FIELDS 48
#define KEY_BYTES 2048
#define URGENCY_BYTES 256
/* No level of urgency. */
#define UNSAID 8
/* What an answer costs beside its octets. */
#define ANSWER_BYTES 512
/* Records that wait to be drained; at full speed those of half a second. */
#define LOG_BYTES (16 * 1024 * 1024)
#define LOG_FIRST_BYTES 4096

/* A record's head (room 2): worker, seconds since MJD 0, microseconds,
 * severity, code, length of what follows; little-endian, without gaps. */
#define RECORD_BYTES 27
/* What its pieces have besides those that are kept: numbers, separators. */
#define RECORD_ROOM 64
#define MJD_SECONDS 3506716800
#define REQUEST_ANSWERED 50001
#define WORKER_BYTES 8

#define BILLION 1000000000LL

struct hot_table {
    PyObject_HEAD
    PyObject *answers; /* {key: capsule of a hot_answer} */
    hot_answer *newest, *oldest;
    size_t cost, limit;
    PyObject *date; /* bytes, the value of the field */
    uint8_t worker[WORKER_BYTES];
    char logs;     /* whether records are wanted */
    PyObject *log; /* bytes with room at its end, or NULL */
    size_t log_used;
    long long lost; /* records that found no room */
    long long hits;
    unsigned long long turn;
    long round; /* that the turn was begun in; none if negative */
};

/* ------------------------------------------------------------------- keys */

/* PRIORITY is of no key, but has to be known as well. */
enum { AUTHORITY, TARGET, ACCEPT, ACCEPT_ENCODING, KEY_PARTS,
       PRIORITY = KEY_PARTS, PARTS };

typedef struct {
    const char *text;
    size_t length;
} word;

#define WORD(text) {text, sizeof(text) - 1}

static const word PART_NAMES[PARTS] = {WORD(":authority"), WORD(":path"),
                                       WORD("accept"),
                                       WORD("accept-encoding"),
                                       WORD("priority")};
static const word METHOD_NAME = WORD(":method"), SCHEME_NAME = WORD(":scheme"),
                  GET = WORD("GET"), HTTPS = WORD("https");

/* Fields that no answer from a file depends on. */
static const word IDLE[] = {
    WORD("user-agent"), WORD("cookie"), WORD("referer"),
    WORD("accept-language"), WORD("cache-control"), WORD("dnt"),
    WORD("origin"), WORD("pragma"), WORD("save-data"), WORD("sec-ch-ua"),
    WORD("sec-ch-ua-mobile"), WORD("sec-ch-ua-platform"),
    WORD("sec-fetch-dest"), WORD("sec-fetch-mode"), WORD("sec-fetch-site"),
    WORD("sec-fetch-user"), WORD("sec-gpc"), WORD("te"),
    WORD("upgrade-insecure-requests"), WORD("x-requested-with")};

/* Whether octets are this word. */
static bool is_word(PyObject *bytes, const word *it)
{
    return (size_t)PyBytes_GET_SIZE(bytes) == it->length &&
           memcmp(PyBytes_AS_STRING(bytes), it->text, it->length) == 0;
}

/* Whether a field leaves the answer as it is. */
static bool is_idle(PyObject *name)
{
    for (size_t n = 0; n < sizeof(IDLE) / sizeof(*IDLE); n++)
        if (is_word(name, &IDLE[n]))
            return true;
    return false;
}

/* Reads a priority field as clients write it, `u=1, i`; false when it says
 * anything else, which room 6 knows more of. */
static bool read_urgency(PyObject *value, hot_urgency *to)
{
    const char *at = PyBytes_AS_STRING(value);
    const char *end = at + PyBytes_GET_SIZE(value);
    if (end - at > URGENCY_BYTES)
        return false;
    for (;; at += strspn(at, ", ")) {
        if (at[0] == 'u' && at[1] == '=' && at[2] >= '0' && at[2] <= '7') {
            to->level = (uint8_t)(at[2] - '0');
            at += 3;
        } else if (at[0] == 'i') {
            to->incremental = true;
            at += 1;
        } else {
            return false;
        }
        if (at[0] == 0)
            return at == end;
        if (at[0] != ',')
            return false;
    }
}

/* Takes one field for the key; false when there is to be none. */
static bool take_field(PyObject **parts, PyObject *name, PyObject *value)
{
    for (int n = 0; n < PARTS; n++) {
        if (!is_word(name, &PART_NAMES[n]))
            continue;
        if (parts[n])
            return false;
        parts[n] = value;
        return true;
    }
    if (is_word(name, &METHOD_NAME))
        return is_word(value, &GET);
    if (is_word(name, &SCHEME_NAME))
        return is_word(value, &HTTPS);
    return is_idle(name);
}

/* The key of a request, new; NULL when it has none or memory is short.  What
 * the request says of its urgency is left there. */
static PyObject *key_of(PyObject *const *fields, size_t count,
                        hot_urgency *urgency)
{
    PyObject *parts[PARTS] = {NULL};
    char octets[KEY_BYTES];
    size_t used = 0;
    for (size_t n = 0; n < count; n++)
        if (!take_field(parts, fields[2 * n], fields[2 * n + 1]))
            return NULL;
    if (parts[AUTHORITY] == NULL || parts[TARGET] == NULL)
        return NULL;
    if (parts[PRIORITY] && !read_urgency(parts[PRIORITY], urgency))
        return NULL;
    for (int n = 0; n < KEY_PARTS; n++) {
        size_t length = parts[n] ? (size_t)PyBytes_GET_SIZE(parts[n]) : 0;
        if (used + length + 2 > KEY_BYTES)
            return NULL;
        /* A missing field is no empty one; no value has a zero octet. */
        octets[used++] = parts[n] ? '+' : '-';
        if (length)
            memcpy(octets + used, PyBytes_AS_STRING(parts[n]), length);
        used += length;
        octets[used++] = 0;
    }
    return PyBytes_FromStringAndSize(octets, (Py_ssize_t)used);
}

/* ---------------------------------------------------------------- answers */

/* Takes an answer out of the order of use. */
static void unlink_answer(hot_table *self, hot_answer *it)
{
    if (it->newer)
        it->newer->older = it->older;
    else
        self->newest = it->older;
    if (it->older)
        it->older->newer = it->newer;
    else
        self->oldest = it->newer;
    it->newer = it->older = NULL;
}

/* Makes it the one that was used last. */
static void link_answer(hot_table *self, hot_answer *it)
{
    it->older = self->newest;
    if (self->newest)
        self->newest->newer = it;
    else
        self->oldest = it;
    self->newest = it;
}

/* Frees an answer; the end of its capsule calls it. */
static void free_answer(PyObject *capsule)
{
    hot_answer *it = PyCapsule_GetPointer(capsule, NULL);
    PyMem_Free(it->fields);
    Py_XDECREF(it->kept);
    PyMem_Free(it);
}

/* Forgets an answer, whose pointer is no good from here on. */
static void forget(hot_table *self, hot_answer *it)
{
    PyObject *key = Py_NewRef(it->key);
    unlink_answer(self, it);
    self->cost -= it->cost;
    if (PyDict_DelItem(self->answers, key) < 0)
        PyErr_Clear();
    Py_DECREF(key);
}

/* Forgets all that was made of a source; whether any of it was used. */
static bool forget_source(hot_table *self, const char *path)
{
    bool used = false;
    for (hot_answer *it = self->newest, *next; it; it = next) {
        next = it->older;
        if (strcmp(it->path, path) != 0)
            continue;
        used |= it->used;
        forget(self, it);
    }
    return used;
}

/* The answer of a key, borrowed; NULL with or without an error. */
static hot_answer *look_up(hot_table *self, PyObject *key)
{
    PyObject *capsule = PyDict_GetItemWithError(self->answers, key);
    return capsule ? PyCapsule_GetPointer(capsule, NULL) : NULL;
}

hot_answer *hot_content(PyObject *capsule)
{
    return PyCapsule_GetPointer(capsule, NULL);
}

PyObject *hot_find(hot_table *self, PyObject *const *fields, size_t count,
                   hot_urgency *urgency)
{
    hot_urgency said = {UNSAID, false};
    if (self->newest == NULL)
        return NULL;
    PyObject *key = key_of(fields, count, &said);
    if (key == NULL)
        return NULL;
    PyObject *capsule = PyDict_GetItemWithError(self->answers, key);
    Py_DECREF(key);
    if (capsule == NULL)
        return NULL;
    const hot_answer *it = hot_content(capsule);
    urgency->level = said.level == UNSAID ? it->level : said.level;
    urgency->incremental = said.incremental || it->incremental;
    return capsule;
}

void hot_begin(hot_table *self)
{
    self->turn++;
    self->round = -1;
}

void hot_begin_in_round(hot_table *self, long round)
{
    if (self->round == round)
        return;
    self->turn++;
    self->round = round;
}

/* Nanoseconds, as a number without a sign. */
static unsigned long long nanoseconds(const struct timespec *moment)
{
    return (unsigned long long)(moment->tv_sec * BILLION + moment->tv_nsec);
}

/* Whether a file is as room 1's file_identity has it. */
static bool is_as_it_was(const hot_answer *it)
{
    struct stat now;
    if (stat(it->path, &now) < 0)
        return false;
    return now.st_dev == it->identity[0] && now.st_ino == it->identity[1] &&
           (unsigned long long)now.st_size == it->identity[2] &&
           nanoseconds(&now.st_mtim) == it->identity[3] &&
           nanoseconds(&now.st_ctim) == it->identity[4];
}

bool hot_confirm(hot_table *self, hot_answer *it)
{
    if (it->looked != self->turn && !is_as_it_was(it)) {
        /* The path belongs to an answer that goes first, maybe. */
        PyObject *kept = Py_NewRef(it->kept);
        forget_source(self, it->path);
        Py_DECREF(kept);
        return false;
    }
    it->looked = self->turn;
    it->used = true;
    self->hits++;
    if (it != self->newest) {
        unlink_answer(self, it);
        link_answer(self, it);
    }
    return true;
}

void hot_date(hot_table *self, hot_answer *it)
{
    nghttp2_nv *date = it->fields + it->field_count - 1;
    date->value = (uint8_t *)PyBytes_AS_STRING(self->date);
    date->valuelen = (size_t)PyBytes_GET_SIZE(self->date);
}

/* -------------------------------------------------------------------- log */

int64_t hot_now(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * BILLION + now.tv_nsec;
}

/* Writes a number of so many octets; returns where the next one goes. */
static uint8_t *put_number(uint8_t *to, uint64_t number, int octets)
{
    for (int n = 0; n < octets; n++)
        *to++ = (uint8_t)(number >> 8 * n);
    return to;
}

/* Writes a piece of a record, as put_number. */
static uint8_t *put_piece(uint8_t *to, PyObject *piece)
{
    size_t length = (size_t)PyBytes_GET_SIZE(piece);
    memcpy(to, PyBytes_AS_STRING(piece), length);
    return to + length;
}

/* Makes room for a record; NULL when there is none. */
static uint8_t *reserve_record(hot_table *self, size_t count)
{
    size_t room = self->log ? (size_t)PyBytes_GET_SIZE(self->log) : 0;
    size_t wanted = self->log_used + count;
    if (wanted > LOG_BYTES)
        return NULL;
    if (wanted > room) {
        room = 2 * room > wanted ? 2 * room : wanted + LOG_FIRST_BYTES;
        /* A failure frees the records, too. */
        if (self->log == NULL)
            self->log = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)room);
        else
            _PyBytes_Resize(&self->log, (Py_ssize_t)room);
    }
    if (self->log == NULL) {
        PyErr_Clear();
        self->log_used = 0;
        return NULL;
    }
    return (uint8_t *)PyBytes_AS_STRING(self->log) + self->log_used;
}

/* Writes a number in decimal digits, as put_number. */
static uint8_t *put_digits(uint8_t *to, uint64_t number)
{
    uint8_t digits[20];
    size_t at = sizeof(digits);
    do {
        digits[--at] = (uint8_t)('0' + number % 10);
        number /= 10;
    } while (number);
    memcpy(to, digits + at, sizeof(digits) - at);
    return to + sizeof(digits) - at;
}

/* The words behind the time: an answer that was broken off is `cut`. */
static uint8_t *put_end(uint8_t *to, const hot_answer *it, bool is_cut)
{
    const char *words = PyBytes_AS_STRING(it->after);
    size_t length = (size_t)PyBytes_GET_SIZE(it->after);
    const char *how = memchr(words, 0, length);
    memcpy(to, "\0h2\0", 4);
    to += 4;
    if (is_cut && how) {
        memcpy(to, "cut", 3);
        to += 3;
        length -= (size_t)(how - words);
        words = how;
    }
    memcpy(to, words, length);
    return to + length;
}

void hot_log(hot_table *self, const hot_answer *it, PyObject *client,
             int64_t start, size_t sent)
{
    struct timespec now;
    if (!self->logs)
        return;
    uint8_t *record = reserve_record(
        self, RECORD_BYTES + RECORD_ROOM + (size_t)PyBytes_GET_SIZE(client) +
                  (size_t)PyBytes_GET_SIZE(it->before) +
                  (size_t)PyBytes_GET_SIZE(it->after));
    if (record == NULL) {
        self->lost++;
        return;
    }
    int64_t spent = hot_now() - start;
    uint64_t tenths = spent > 0 ? ((uint64_t)spent + 50000) / 100000 : 0;
    uint8_t *to = put_piece(record + RECORD_BYTES, client);
    *to++ = 0;
    to = put_piece(to, it->before);
    *to++ = 0;
    to = put_digits(to, sent);
    *to++ = 0;
    to = put_digits(to, tenths / 10);
    *to++ = '.';
    to = put_end(put_digits(to, tenths % 10), it, sent < it->length);
    size_t length = (size_t)(to - record);
    clock_gettime(CLOCK_REALTIME, &now);
    memcpy(record, self->worker, WORKER_BYTES);
    to = put_number(record + WORKER_BYTES, (uint64_t)now.tv_sec + MJD_SECONDS,
                    8);
    to = put_number(to, (uint64_t)now.tv_nsec / 1000, 4);
    to = put_number(to, REQUEST_ANSWERED / 10000, 1);
    to = put_number(to, REQUEST_ANSWERED, 2);
    put_number(to, length - RECORD_BYTES, 4);
    self->log_used += length;
}

/* ----------------------------------------------------------- what is put in */

/* Sets a type error and returns -1. */
static int refuse(const char *reason)
{
    PyErr_SetString(PyExc_TypeError, reason);
    return -1;
}

/* Whether it is a pair of bytes and no more. */
static bool is_pair(PyObject *it)
{
    return PyTuple_CheckExact(it) && PyTuple_GET_SIZE(it) == 2 &&
           PyBytes_CheckExact(PyTuple_GET_ITEM(it, 0)) &&
           PyBytes_CheckExact(PyTuple_GET_ITEM(it, 1));
}

/* The key of a list of pairs, new; NULL with or without an error. */
static PyObject *key_of_list(PyObject *list)
{
    PyObject *fields[2 * MOST_FIELDS];
    hot_urgency said;
    Py_ssize_t count = PyList_GET_SIZE(list);
    if (count > MOST_FIELDS)
        return NULL;
    for (Py_ssize_t n = 0; n < count; n++) {
        PyObject *pair = PyList_GET_ITEM(list, n);
        if (!is_pair(pair)) {
            refuse("a field is a pair of bytes");
            return NULL;
        }
        fields[2 * n] = PyTuple_GET_ITEM(pair, 0);
        fields[2 * n + 1] = PyTuple_GET_ITEM(pair, 1);
    }
    return key_of(fields, (size_t)count, &said);
}

/* One field for nghttp2, which borrows its octets. */
static nghttp2_nv field_of(PyObject *name, PyObject *value)
{
    return (nghttp2_nv){
        (uint8_t *)PyBytes_AS_STRING(name),
        (uint8_t *)PyBytes_AS_STRING(value),
        (size_t)PyBytes_GET_SIZE(name), (size_t)PyBytes_GET_SIZE(value),
        NGHTTP2_NV_FLAG_NO_COPY_NAME | NGHTTP2_NV_FLAG_NO_COPY_VALUE};
}

/* Reads the head, a tuple of pairs; -1 with an error. */
static int read_head(hot_answer *it, PyObject *head)
{
    Py_ssize_t count = PyTuple_GET_SIZE(head);
    it->fields = PyMem_New(nghttp2_nv, count + 1);
    if (it->fields == NULL) {
        PyErr_NoMemory();
        return -1;
    }
    for (Py_ssize_t n = 0; n < count; n++) {
        PyObject *pair = PyTuple_GET_ITEM(head, n);
        if (!is_pair(pair))
            return refuse("a field is a pair of bytes");
        it->fields[n] =
            field_of(PyTuple_GET_ITEM(pair, 0), PyTuple_GET_ITEM(pair, 1));
        it->cost += it->fields[n].namelen + it->fields[n].valuelen;
    }
    it->fields[count] = (nghttp2_nv){
        (uint8_t *)"date", NULL, 4, 0,
        NGHTTP2_NV_FLAG_NO_COPY_NAME | NGHTTP2_NV_FLAG_NO_COPY_VALUE};
    it->field_count = (size_t)count + 1;
    return 0;
}

/* Reads (path, identity); -1 with an error. */
static int read_source(hot_answer *it, PyObject *source)
{
    PyObject *path, *numbers;
    char *octets;
    if (!PyArg_ParseTuple(source, "SO!:source", &path, &PyTuple_Type,
                          &numbers))
        return -1;
    /* Without a zero octet in it. */
    if (PyBytes_AsStringAndSize(path, &octets, NULL) < 0)
        return -1;
    it->path = octets;
    unsigned long long *to = it->identity;
    return PyArg_ParseTuple(numbers, "KKKKK:identity", to, to + 1, to + 2,
                            to + 3, to + 4) ? 0 : -1;
}

/* Makes a capsule of an answer, new, with the pointer to what is in it. */
static PyObject *encapsulate(PyObject *key, PyObject *kept, hot_answer **it)
{
    *it = PyMem_Calloc(1, sizeof(hot_answer));
    if (*it == NULL)
        return PyErr_NoMemory();
    PyObject *capsule = PyCapsule_New(*it, NULL, free_answer);
    if (capsule == NULL) {
        PyMem_Free(*it);
        return NULL;
    }
    (*it)->key = key;
    (*it)->kept = Py_NewRef(kept);
    return capsule;
}

/* Fills an answer with what it keeps; -1 with an error. */
static int fill(hot_answer *it)
{
    PyObject *body = PyTuple_GET_ITEM(it->kept, 1);
    PyObject *words = PyTuple_GET_ITEM(it->kept, 3);
    if (read_head(it, PyTuple_GET_ITEM(it->kept, 0)) < 0 ||
        read_source(it, PyTuple_GET_ITEM(it->kept, 2)) < 0)
        return -1;
    if (!is_pair(words))
        return refuse("words are a pair of bytes");
    it->before = PyTuple_GET_ITEM(words, 0);
    it->after = PyTuple_GET_ITEM(words, 1);
    it->body = (const uint8_t *)PyBytes_AS_STRING(body);
    it->length = (size_t)PyBytes_GET_SIZE(body);
    it->cost += ANSWER_BYTES + it->length +
                (size_t)PyBytes_GET_SIZE(it->key) +
                (size_t)PyBytes_GET_SIZE(it->before) +
                (size_t)PyBytes_GET_SIZE(it->after);
    return 0;
}

/* Keeps an answer, and forgets others that were not used for longest. */
static int keep(hot_table *self, PyObject *key, PyObject *capsule,
                hot_answer *it)
{
    hot_answer *former = look_up(self, key);
    if (former)
        forget(self, former);
    if (PyErr_Occurred() ||
        PyDict_SetItem(self->answers, key, capsule) < 0)
        return -1;
    link_answer(self, it);
    self->cost += it->cost;
    while (self->oldest && (self->cost > self->limit ||
                            PyDict_GET_SIZE(self->answers) > MOST_ANSWERS))
        forget(self, self->oldest);
    return 0;
}

/* --------------------------------------------------------------- methods */

PyDoc_STRVAR(put_doc,
             "put(fields, head, body, source, words, urgency): keeps an "
             "answer.\n\n"
             "`fields` are those of the request that was answered; one that\n"
             "others cannot be the same as is passed over.  `head` is a\n"
             "tuple of pairs, `source` (path, identity), `words` the log's\n"
             "pieces between client and octets, and those behind the\n"
             "protocol; `urgency` (level, incremental) is for requests that\n"
             "say nothing of it.");

static PyObject *table_put(hot_table *self, PyObject *args)
{
    PyObject *list, *head, *body, *source, *words;
    unsigned char level;
    int incremental;
    hot_answer *it;
    if (!PyArg_ParseTuple(args, "O!O!SO!O!(bp):put", &PyList_Type, &list,
                          &PyTuple_Type, &head, &body, &PyTuple_Type, &source,
                          &PyTuple_Type, &words, &level, &incremental))
        return NULL;
    if (PyBytes_GET_SIZE(body) == 0 || PyBytes_GET_SIZE(body) > HOT_BODY_BYTES)
        Py_RETURN_NONE;
    PyObject *key = key_of_list(list);
    if (key == NULL)
        return PyErr_Occurred() ? NULL : Py_NewRef(Py_None);
    /* All of it but the request, which had cookies, maybe. */
    PyObject *kept = PyTuple_GetSlice(args, 1, 5);
    PyObject *capsule = kept ? encapsulate(key, kept, &it) : NULL;
    if (capsule) {
        it->level = level;
        it->incremental = incremental;
    }
    int failed = capsule == NULL || fill(it) < 0 ||
                 keep(self, key, capsule, it) < 0;
    Py_XDECREF(capsule);
    Py_XDECREF(kept);
    Py_DECREF(key);
    return failed ? NULL : Py_NewRef(Py_None);
}

PyDoc_STRVAR(drop_doc,
             "Forgets the answers that were made of a file; whether any was "
             "used.");

static PyObject *table_drop(hot_table *self, PyObject *path)
{
    char *octets;
    if (PyBytes_AsStringAndSize(path, &octets, NULL) < 0)
        return NULL;
    return PyBool_FromLong(forget_source(self, octets));
}

PyDoc_STRVAR(clear_doc, "Forgets all answers.");

static PyObject *table_clear(hot_table *self, PyObject *nothing)
{
    (void)nothing;
    while (self->oldest)
        forget(self, self->oldest);
    Py_RETURN_NONE;
}

PyDoc_STRVAR(drain_doc,
             "(records back to back, number of lost ones) since last time.");

static PyObject *table_drain(hot_table *self, PyObject *nothing)
{
    PyObject *records = self->log;
    (void)nothing;
    self->log = NULL;
    if (records == NULL)
        records = PyBytes_FromStringAndSize(NULL, 0);
    else
        _PyBytes_Resize(&records, (Py_ssize_t)self->log_used);
    self->log_used = 0;
    long long lost = self->lost;
    self->lost = 0;
    return records ? Py_BuildValue("NL", records, lost) : NULL;
}

static PyObject *table_get_date(hot_table *self, void *nothing)
{
    (void)nothing;
    return Py_NewRef(self->date);
}

static int table_set_date(hot_table *self, PyObject *date, void *nothing)
{
    (void)nothing;
    if (date == NULL || !PyBytes_CheckExact(date))
        return refuse("a date is bytes");
    Py_XSETREF(self->date, Py_NewRef(date));
    return 0;
}

static Py_ssize_t table_length(hot_table *self)
{
    return PyDict_GET_SIZE(self->answers);
}

/* ------------------------------------------------------- life of a table */

/* HotTable(limit_bytes, worker, logs) */
static PyObject *table_new(PyTypeObject *type, PyObject *args,
                           PyObject *keywords)
{
    static char *names[] = {"limit_bytes", "worker", "logs", NULL};
    Py_ssize_t limit, length;
    const char *worker;
    int logs;
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "ns#p", names, &limit,
                                     &worker, &length, &logs))
        return NULL;
    hot_table *self = (hot_table *)type->tp_alloc(type, 0);
    if (self == NULL)
        return NULL;
    self->limit = limit > 0 ? (size_t)limit : 0;
    self->logs = (char)logs;
    memset(self->worker, ' ', WORKER_BYTES);
    memcpy(self->worker, worker,
           length < WORKER_BYTES ? (size_t)length : WORKER_BYTES);
    self->answers = PyDict_New();
    self->date = PyBytes_FromStringAndSize(NULL, 0);
    if (self->answers == NULL || self->date == NULL)
        Py_CLEAR(self);
    return (PyObject *)self;
}

static void table_dealloc(hot_table *self)
{
    PyTypeObject *type = Py_TYPE(self);
    Py_XDECREF(self->answers);
    Py_XDECREF(self->date);
    Py_XDECREF(self->log);
    type->tp_free(self);
    Py_DECREF(type);
}

#define METHOD(name, flags) \
    {#name, (PyCFunction)(void (*)(void))table_##name, flags, name##_doc}

static PyMethodDef table_methods[] = {
    METHOD(put, METH_VARARGS), METHOD(drop, METH_O),
    METHOD(clear, METH_NOARGS), METHOD(drain, METH_NOARGS),
    {NULL, NULL, 0, NULL}};

static PyMemberDef table_members[] = {
    {"hits", T_LONGLONG, offsetof(hot_table, hits), READONLY,
     "answers that were given"},
    {NULL, 0, 0, 0, NULL}};

static PyGetSetDef table_attributes[] = {
    {"date", (getter)table_get_date, (setter)table_set_date,
     "value of the date field of answers", NULL},
    {NULL, NULL, NULL, NULL, NULL}};

PyDoc_STRVAR(table_doc, "Answers that engines of this process give.");

static PyType_Slot table_slots[] = {
    {Py_tp_doc, (void *)table_doc},
    {Py_tp_new, table_new},
    {Py_tp_dealloc, table_dealloc},
    {Py_tp_methods, table_methods},
    {Py_tp_members, table_members},
    {Py_tp_getset, table_attributes},
    {Py_sq_length, table_length},
    {0, NULL}};

PyType_Spec hot_table_spec = {
    .name = "shimmercat_ext.native.HotTable",
    .basicsize = sizeof(hot_table),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = table_slots};
