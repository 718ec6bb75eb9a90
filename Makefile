# make help lists the targets.
GO            ?= go
STATICCHECK   := honnef.co/go/tools/cmd/staticcheck@v0.8.2
BUF           := github.com/bufbuild/buf/cmd/buf@v1.75.0
PROTOC_GEN_GO := google.golang.org/protobuf/cmd/protoc-gen-go@v1.36.12
PROTOC_GRPC   := google.golang.org/grpc/cmd/protoc-gen-go-grpc@v1.6.2
TOOLS         := $(CURDIR)/.tools
# A number of inputs (5000x) or a time. Go 1.26 may report the end of a time as
# a failure of the fuzzer (golang/go#75804), so CI gives a number.
FUZZTIME      ?= 20000x
LEASES        ?= 100000
KILLS         ?= 50
LOCKS         ?= 1000000
SEQUENCES     ?= 100000
SEEDS         ?= 2000
SHIPPED       ?= 2000
CRASHES       ?= 200
RUNS          ?= 100
FAULTS        ?= 100
# How long crashes, linearizability and pauses may go on, budget or not; 0s: as long as they take.
WITHIN        ?= 0s
DURATION      ?= 10m
BELIEVE       ?= 1m
MISTAKES      ?= 100
ATTACKS       ?= 3
RETURNING     ?= 1000000
RETURNING_TTL ?= 30s
# Operations that make believe goes on for at least, on one node and on three.
BELIEVED      ?= 0
RECORDS       ?= 1000
FLIPS         ?= 2000

BENCHSTAT     := golang.org/x/perf/cmd/benchstat@v0.0.0-20260908200009-22c9c6c9d4da
BENCH         ?= .
BENCHED       ?= ./lease/... ./transport ./internal/replica
COUNT         ?= 6
# What to compare with: the last commit, or the one before where nothing has changed since.
BASE          ?= $(shell git diff --quiet HEAD && echo HEAD~1 || echo HEAD)
SCALE         ?= 1000000

.PHONY: help
help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "%-16s %s\n", $$1, $$2}'

.PHONY: build
build: ## build the distlock binary
	CGO_ENABLED=0 $(GO) build -trimpath -o distlock ./cmd/distlock

.PHONY: test
test: ## run all tests with the race detector
	$(GO) test -race ./...

# Those that run no processes and whose disks are small.
QUICK := ./lease/... ./fence/... ./transport ./client ./cmd/... ./internal/archtest ./internal/bound ./internal/server ./proto/wire \
	./internal/metrics ./internal/reliability/check ./internal/reliability/mutants

.PHONY: check
check: lint ## what to run before a push: lint, and the tests that take little
	$(GO) test $(QUICK)

.PHONY: stores
stores: ## hold the guards against real PostgreSQL, MariaDB and Redis (needs postgresql, mariadb-server, redis-server)
	cd internal/storetest && $(GO) mod tidy # the core's requirements are this module's too
	cd internal/storetest && $(GO) vet ./... && $(GO) test -count=1 -timeout 10m ./...

.PHONY: original
original: ## drive the original's protocol from Python (needs python3-grpcio, python3-grpc-tools)
	$(GO) test -tags original -run TestOriginalProtocol -v ./internal/e2e

.PHONY: lint
lint: ## gofmt, vet, staticcheck
	@test -z "$$(gofmt -l .)" || { echo "gofmt -w these:"; gofmt -l .; exit 1; }
	$(GO) vet ./...
	$(GO) vet -tags original,upgrade ./internal/e2e
	$(GO) run $(STATICCHECK) ./...

.PHONY: elsewhere
elsewhere: ## vet for macOS and Windows: the client and in-memory servers are to build there
	GOOS=darwin $(GO) vet ./...
	GOOS=windows $(GO) vet ./...

.PHONY: generate
generate: ## generate the code of the protocols
	GOBIN=$(TOOLS) $(GO) install $(BUF)
	GOBIN=$(TOOLS) $(GO) install $(PROTOC_GEN_GO)
	GOBIN=$(TOOLS) $(GO) install $(PROTOC_GRPC)
	cd proto && PATH=$(TOOLS):$$PATH buf lint
	cd proto && PATH=$(TOOLS):$$PATH buf generate

.PHONY: check-generated
check-generated: generate ## fail when the generated code is not up to date
	@test -z "$$(git status --porcelain proto)" || { git --no-pager diff proto; echo "run 'make generate' and commit"; exit 1; }

.PHONY: oracle
oracle: ## run SEQUENCES random sequences against the machine and its oracle
	$(GO) test ./lease/machine -run TestOracle -rapid.checks=$(SEQUENCES)

.PHONY: sim
sim: ## simulate SEEDS clusters under faults, in virtual time
	bash -o pipefail -c "$(GO) test ./internal/reliability/sim -v -run 'TestSeeds|TestNobodyStarves' -args -seeds $(SEEDS) -handoffs 1000000 | grep -v '^ *--- PASS\|^=== '"

.PHONY: shipped
shipped: ## simulate SHIPPED clusters with the shipped client, and compare what both sides have
	GOMAXPROCS=4 bash -o pipefail -c "$(GO) test ./internal/reliability/sim -v -timeout 0 -run TestShippedClients -args -live $(SHIPPED) | grep -v '^ *--- PASS\|^=== '"

.PHONY: files
files: ## cut a log of RECORDS at every record, and flip FLIPS of its bits
	$(GO) test ./internal/replica -v -run 'Prefix|NeverServed' -args -records $(RECORDS) -flips $(FLIPS)

.PHONY: crashes
crashes: ## kill the server CRASHES times, at random and at its nth write or sync (needs strace)
	$(GO) test ./internal/e2e -v -timeout 30m -run '^TestCrashes' -args -crashes $(CRASHES) -first-crashes 4 -within $(WITHIN)

.PHONY: soak
soak: ## work a server for DURATION and watch its heap, goroutines, files and disk
	$(GO) test ./internal/e2e -v -timeout 0 -run TestSoak -args -soak $(DURATION)

.PHONY: pauses
pauses: ## stop servers and clients and harm their network, FAULTS times in each way
	$(GO) test ./internal/e2e -v -timeout 60m -parallel 7 -run TestPausesAndPartitions -args -faults $(FAULTS) -within $(WITHIN)

.PHONY: linearizability
linearizability: ## look for an order that explains RUNS histories of one node and of three under faults
	$(GO) test ./internal/e2e -v -timeout 60m -parallel 3 -run 'TestLinearizable|TestModel' -args -runs $(RUNS) -operations 5000 -within $(WITHIN)

# The last commit of level 1, which everything newer must be able to replace.
OLD ?= 6658922

.PHONY: has-old
has-old: ## fail where the history has no OLD to upgrade from
	@git cat-file -e $(OLD)^{commit}

.PHONY: upgrade
upgrade: ## run the build of OLD beside this one, and upgrade a cluster under load in both orders
	rm -rf .bench/old && mkdir -p .bench/old
	git archive $(OLD) | tar x -C .bench/old
	cd .bench/old && CGO_ENABLED=0 $(GO) build -trimpath -o distlock-old ./cmd/distlock
	$(GO) test -tags upgrade ./internal/e2e -v -timeout 20m -run '^TestUpgrade' -args -old $(CURDIR)/.bench/old/distlock-old

.PHONY: believe
believe: ## hold what servers have against what real clients believe, under faults, for BELIEVE
	$(GO) test ./internal/e2e -v -timeout 0 -run TestBelieve -args -believe $(BELIEVE) -believed $(BELIEVED)

.PHONY: hostile
hostile: ## attack servers as one peer can, ATTACKS times as hard as CI does; RETURNING leases come back at once
	$(GO) test ./internal/e2e -v -timeout 0 -run '^(TestAttack|TestHostile|TestStrangers|TestTooManyConnections|TestEverybodyReturns)' \
	  -args -attacks $(ATTACKS) -returning $(RETURNING) -returning-ttl $(RETURNING_TTL)

.PHONY: members
members: ## make MISTAKES sequences of operators' mistakes with a cluster, and judge what is left
	$(GO) test ./internal/e2e -v -timeout 0 -run TestMistakes -args -first-mistakes 0 -mistakes $(MISTAKES) -within $(WITHIN)

.PHONY: mutants
mutants: ## plant each known bug and see which layers catch it (MUTANTS=-gate: only the one that must)
	$(GO) run ./internal/reliability/mutants $(MUTANTS)

# Each is package@fuzzer.
FUZZERS := lease/machine@FuzzDecodeBatch lease/machine@FuzzRestore transport@FuzzAcquireRequest transport@FuzzRequests \
	proto/wire@FuzzRequest proto/wire@FuzzResponse internal/replica@FuzzUnseal internal/replica@FuzzEntry internal/replica@FuzzSnapshot

.PHONY: fuzz $(FUZZERS)
fuzz: ## fuzz every decoder and validator for FUZZTIME each, at once
	for package in $(sort $(foreach f,$(FUZZERS),$(firstword $(subst @, ,$(f))))); do \
	  $(GO) test -run '^$$' -fuzz FuzzNone ./$$package || exit 1; done # builds what they share once
	$(MAKE) -j $(FUZZERS)
$(FUZZERS):
	$(GO) test -run '^$$' -fuzz '^$(lastword $(subst @, ,$@))$$' -fuzztime $(FUZZTIME) -fuzzminimizetime 100x ./$(firstword $(subst @, ,$@))

.PHONY: expiry
expiry: ## let LEASES leases expire and print the lag
	$(GO) test -run TestExpiryLag -v ./internal/e2e -args -leases $(LEASES)

.PHONY: failover
failover: ## kill KILLS leaders under load, and stop as many processes for up to 3 TTLs
	$(GO) test -run 'TestCluster(Kills|Pauses)' -v -timeout 60m ./internal/e2e -args -kills $(KILLS) -pauses $(KILLS) -election 200ms

.PHONY: many
many: ## hold LOCKS locks through snapshots, a restart and the end of all leases at once
	$(GO) test -run 'TestManyLocks|TestMassExpiry' -v -timeout 60m ./internal/e2e -args -held $(LOCKS)

.PHONY: bench
bench: ## run the Go benchmarks matching BENCH here and at BASE, and compare them
	rm -rf .bench && mkdir .bench && git worktree prune && git worktree add --detach .bench/base $(BASE)
	cd .bench/base && $(GO) test -run '^$$' -bench '$(BENCH)' -benchmem -count $(COUNT) $(BENCHED) | tee ../before.txt
	$(GO) test -run '^$$' -bench '$(BENCH)' -benchmem -count $(COUNT) $(BENCHED) | tee .bench/after.txt
	git worktree remove --force .bench/base
	$(GO) run $(BENCHSTAT) .bench/before.txt .bench/after.txt

.PHONY: scale
scale: build ## keep SCALE leases with a lock each alive from 100 connections; the cost of a lock among many
	$(GO) test -run '^$$' -bench AcquireRelease -benchmem ./lease/machine
	dir=$$(mktemp -d); ./distlock --run-async --data-dir $$dir --port 50151 --metrics-address localhost:50152 --pprof & pid=$$!; sleep 1; \
	  ./distlock bench keepalive --no-echo --endpoints localhost:50151 --metrics http://localhost:50152/metrics \
	    --leases $(SCALE) --connections 100 --ttl 30s --every 20s --duration 60s; \
	  code=$$?; kill $$pid; wait $$pid; rm -rf $$dir; exit $$code
