"""A client of the original protocol, driven by TestOriginalProtocol.

Stubs made from our copy of the proto are on PYTHONPATH. The one argument is
the server's address. Lines on standard output that begin with "ASK " are
requests to the test (restart the server; take or release a lock with our own
client); the test answers each with one line on standard input.
"""
import sys
import threading
import time

import grpc

import distlock_pb2 as pb
import distlock_pb2_grpc as rpc

address = sys.argv[1]
stub = rpc.DistlockStub(grpc.insecure_channel(address))
checks = 0


def check(condition, text):
    global checks
    checks += 1
    if not condition:
        print("FAILED", text, flush=True)
        sys.exit(1)


def ask(what):
    print("ASK", what, flush=True)
    answer = sys.stdin.readline().strip()
    check(answer.startswith("ok"), "%s answered %r" % (what, answer))
    return answer[2:].strip()


def refused(call, request, code, details):
    try:
        call(request)
    except grpc.RpcError as error:
        check(error.code() == code, "%r: code %s, want %s" % (details, error.code(), code))
        check(error.details() == details, "details %r, want %r" % (error.details(), details))
        return
    check(False, "not refused: " + details)


def near(timestamp, seconds, text):
    left = timestamp.seconds + timestamp.nanos / 1e9 - time.time()
    check(seconds - 5 < left <= seconds + 1, "%s: %.3f s left, want about %d" % (text, left, seconds))


# Nothing exists.
missing = "A lock with key ghost does not exist"
for call, request in (
    (stub.AcquireLock, pb.AcquireLockRequest(key="ghost")),
    (stub.GetLock, pb.Lock(key="ghost")),
    (stub.ReleaseLock, pb.Lock(key="ghost", clock=1)),
    (stub.DeleteLock, pb.Lock(key="ghost")),
):
    refused(call, request, grpc.StatusCode.NOT_FOUND, missing)
check(len(stub.ListLocks(pb.EmptyRequest()).locks) == 0, "list of an empty server")

# Create.
check(stub.CreateLock(pb.Lock(key="a")) == pb.EmptyResponse(), "create")
refused(stub.CreateLock, pb.Lock(key="a"), grpc.StatusCode.ALREADY_EXISTS, "A lock with key a already exists")
fresh = stub.GetLock(pb.Lock(key="a"))
check(fresh.key == "a" and fresh.clock == 0 and not fresh.acquired, "a new lock")
check(fresh.expires_at.seconds == 0 and fresh.expires_at.nanos == 0, "a new lock's expires_at is the epoch")

# Acquire: free, held, default of 60 s after 0.
first = stub.AcquireLock(pb.AcquireLockRequest(key="a", expires_in_seconds=30))
check(first.acquired and first.clock == 1 and first.key == "a", "acquire of a free lock")
near(first.expires_at, 30, "acquire for 30 s")
held = stub.AcquireLock(pb.AcquireLockRequest(key="a", expires_in_seconds=99))
check(not held.acquired and held.clock == 1, "acquire of a held lock")
check(held.expires_at == first.expires_at, "a held lock's expires_at is its holder's")
got = stub.GetLock(pb.Lock(key="a"))
check(got.acquired and got.clock == 1 and got.expires_at == first.expires_at, "get of a held lock")

# Release: wrong clock, right clock, again.
try:
    stub.ReleaseLock(pb.Lock(key="a", clock=7))
    check(False, "a release with the wrong clock is refused")
except grpc.RpcError as error:
    check(error.code() == grpc.StatusCode.ABORTED, "wrong clock: %s" % error.code())
    check("7" in error.details() and "1" in error.details(), "both clocks are named: %r" % error.details())
check(stub.GetLock(pb.Lock(key="a")).acquired, "a refused release changes nothing")
stub.ReleaseLock(pb.Lock(key="a", clock=1))
check(not stub.GetLock(pb.Lock(key="a")).acquired, "released")
stub.ReleaseLock(pb.Lock(key="a", clock=1))
default = stub.AcquireLock(pb.AcquireLockRequest(key="a"))
check(default.acquired and default.clock == 2, "acquire again")
near(default.expires_at, 60, "0 seconds means 60")
stub.ReleaseLock(pb.Lock(key="a", clock=2))

# Expiry: taken over after it, and released after it.
brief = stub.AcquireLock(pb.AcquireLockRequest(key="a", expires_in_seconds=1))
check(brief.clock == 3, "third clock")
deadline = time.time() + 10
while True:
    taken = stub.AcquireLock(pb.AcquireLockRequest(key="a", expires_in_seconds=1))
    if taken.acquired:
        break
    check(time.time() < deadline, "an expired lock is free")
    time.sleep(0.05)
check(taken.clock == 4, "an expired lock gets the next clock")
end = time.time() + 10
while stub.GetLock(pb.Lock(key="a")).acquired:
    check(time.time() < end, "the lock expires")
    time.sleep(0.05)
stub.ReleaseLock(pb.Lock(key="a", clock=4))

# Our own clients and the original's exclude each other.
token = int(ask("take a"))
other = stub.AcquireLock(pb.AcquireLockRequest(key="a", expires_in_seconds=5))
check(not other.acquired, "our client's hold excludes the original's")
ask("release a %d" % token)
mine = stub.AcquireLock(pb.AcquireLockRequest(key="a", expires_in_seconds=30))
check(mine.acquired and mine.clock == 6, "a clock for each grant, whoever asks: %d" % mine.clock)
ask("held a")
stub.ReleaseLock(pb.Lock(key="a", clock=mine.clock))

# List and delete; delete works on a held lock and forgets the clock.
stub.CreateLock(pb.Lock(key="b"))
check([l.key for l in stub.ListLocks(pb.EmptyRequest()).locks] == ["a", "b"], "list")
check(stub.AcquireLock(pb.AcquireLockRequest(key="b", expires_in_seconds=30)).acquired, "acquire b")
stub.DeleteLock(pb.Lock(key="b"))
refused(stub.GetLock, pb.Lock(key="b"), grpc.StatusCode.NOT_FOUND, "A lock with key b does not exist")
stub.CreateLock(pb.Lock(key="b"))
again = stub.AcquireLock(pb.AcquireLockRequest(key="b", expires_in_seconds=30))
check(again.acquired and again.clock == 1, "a deleted lock's clock is forgotten")

# Twenty threads contend on one key for ten seconds; the server is killed and
# restarted in the middle. A call that a restart cut has an unknown outcome.
stub.CreateLock(pb.Lock(key="hot"))
inside, guard, clocks, failures, cut = [0], threading.Lock(), [], [], [0]
stop_at = time.time() + 10


def contend(number):
    channel = grpc.insecure_channel(address)
    mine = rpc.DistlockStub(channel)
    while time.time() < stop_at:
        try:
            lock = mine.AcquireLock(pb.AcquireLockRequest(key="hot", expires_in_seconds=2), timeout=5)
        except grpc.RpcError as error:
            if error.code() != grpc.StatusCode.UNAVAILABLE:
                failures.append("acquire: %s" % error)
                return
            cut[0] += 1
            time.sleep(0.05)
            continue
        if not lock.acquired:
            time.sleep(0.002)
            continue
        with guard:
            inside[0] += 1
            clocks.append(lock.clock)
            if inside[0] != 1:
                failures.append("two inside at clock %d" % lock.clock)
        time.sleep(0.001)
        with guard:
            inside[0] -= 1
        while True:
            try:
                mine.ReleaseLock(pb.Lock(key="hot", clock=lock.clock), timeout=5)
                break
            except grpc.RpcError as error:
                if error.code() == grpc.StatusCode.ABORTED:
                    break  # released by the cut call and taken by another since
                if error.code() != grpc.StatusCode.UNAVAILABLE:
                    failures.append("release: %s" % error)
                    return
                cut[0] += 1
                time.sleep(0.05)
    channel.close()


threads = [threading.Thread(target=contend, args=(n,)) for n in range(20)]
for t in threads:
    t.start()
time.sleep(4)
before = len(clocks)
ask("restart")
for t in threads:
    t.join()
check(not failures, "; ".join(failures[:3]))
check(before > 50 and len(clocks) > before + 50, "grants before and after the restart: %d, %d" % (before, len(clocks) - before))
check(clocks == sorted(set(clocks)), "clocks strictly rise in the order of holding")
check(stub.GetLock(pb.Lock(key="b")).clock == 1, "a lock outlives the restart")
print("PASSED %d checks, %d grants by 20 threads, %d calls cut by the restart" % (checks, len(clocks), cut[0]), flush=True)
