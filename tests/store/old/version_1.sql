BEGIN TRANSACTION;
CREATE TABLE artifact (
	trial INTEGER NOT NULL, 
	sample INTEGER NOT NULL, 
	path VARCHAR(255) NOT NULL, 
	kept INTEGER NOT NULL, 
	UNIQUE (trial, sample)
);
INSERT INTO "artifact" VALUES(0,0,'artifacts/t0000/s0/adapter',1);
CREATE TABLE driver (
	id INTEGER NOT NULL, 
	fence INTEGER NOT NULL, 
	holder VARCHAR(64), 
	host VARCHAR(255), 
	pid INTEGER, 
	process_started FLOAT, 
	expires FLOAT NOT NULL, 
	PRIMARY KEY (id)
);
INSERT INTO "driver" VALUES(1,1,NULL,'old-host',9988,1795648018.61,0.0);
CREATE TABLE feedback_event (
	id VARCHAR(64) NOT NULL, 
	trial INTEGER NOT NULL, 
	sample INTEGER NOT NULL, 
	value FLOAT NOT NULL, 
	received FLOAT NOT NULL, 
	PRIMARY KEY (id)
);
CREATE TABLE observation (
	trial INTEGER NOT NULL, 
	value FLOAT NOT NULL, 
	sem FLOAT, 
	k INTEGER NOT NULL, 
	k_used INTEGER NOT NULL, 
	best_sample INTEGER NOT NULL, 
	PRIMARY KEY (trial), 
	FOREIGN KEY(trial) REFERENCES trial (number)
);
INSERT INTO "observation" VALUES(-1,3.00000000000000044408e-01,NULL,1,1,0);
INSERT INTO "observation" VALUES(0,0.5,NULL,2,1,0);
CREATE TABLE sample (
	trial INTEGER NOT NULL, 
	sample INTEGER NOT NULL, 
	value FLOAT, 
	result JSON NOT NULL, 
	PRIMARY KEY (trial, sample), 
	FOREIGN KEY(trial) REFERENCES trial (number)
);
INSERT INTO "sample" VALUES(-1,0,3.00000000000000044408e-01,'{"spec": {"trial": -1, "sample": 0, "kind": "base", "counts": null}, "value": 0.30000000000000004, "reason": null, "stderr": null, "metrics": {}, "train": {}, "train_seconds": 0.0, "feedback_seconds": 0.0, "rows_digest": null, "adapter": null, "lease": 0, "n_retries": 0}');
INSERT INTO "sample" VALUES(0,0,0.5,'{"spec": {"trial": 0, "sample": 0, "kind": "start", "counts": [3, 7]}, "value": 0.5, "reason": null, "stderr": null, "metrics": {"accuracy": 0.25}, "train": {}, "train_seconds": 0.0, "feedback_seconds": 0.0, "rows_digest": null, "adapter": "artifacts/t0000/s0/adapter", "lease": 0, "n_retries": 0}');
INSERT INTO "sample" VALUES(0,1,NULL,'{"spec": {"trial": 0, "sample": 1, "kind": "start", "counts": [3, 7]}, "value": null, "reason": "the loss is not finite", "stderr": null, "metrics": {}, "train": {"last_loss": NaN}, "train_seconds": 0.0, "feedback_seconds": 0.0, "rows_digest": null, "adapter": null, "lease": 0, "n_retries": 0}');
CREATE TABLE study (
	id INTEGER NOT NULL, 
	name VARCHAR(64) NOT NULL, 
	schema_version INTEGER NOT NULL, 
	config JSON NOT NULL, 
	inputs JSON NOT NULL, 
	resolved JSON NOT NULL, 
	domains JSON NOT NULL, 
	versions JSON NOT NULL, 
	status VARCHAR(16) NOT NULL, 
	created FLOAT NOT NULL, 
	seconds FLOAT NOT NULL, 
	PRIMARY KEY (id)
);
INSERT INTO "study" VALUES(1,'old',1,'{"name": "old", "seed": 3}','{"folder": "/somewhere"}','{"training.fuse": 1}','[{"name": "maths", "notes": ["a note"]}]','{"ray": "2.60.0"}','paused',1760000000.0,12.5);
CREATE TABLE trial (
	number INTEGER NOT NULL, 
	kind VARCHAR(16) NOT NULL, 
	counts JSON, 
	status VARCHAR(16) NOT NULL, 
	method VARCHAR(64) NOT NULL, 
	reason TEXT, 
	PRIMARY KEY (number)
);
INSERT INTO "trial" VALUES(-1,'base','null','done','base',NULL);
INSERT INTO "trial" VALUES(0,'start','[3, 7]','done','random',NULL);
INSERT INTO "trial" VALUES(1,'start','[5, 5]','failed','random','no sample has a value');
INSERT INTO "trial" VALUES(2,'start','[10, 0]','pending','random',NULL);
COMMIT;
